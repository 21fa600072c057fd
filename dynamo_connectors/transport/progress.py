"""NIXL's progress thread rests. Its Python API hard-codes a delay of 0, with which every agent keeps a core busy.

Two idle agents of NIXL 1.5.1 took 1.37 cores, and take 0.04 with 100 us; READs became no slower (2-core machine with
other work on it, 2026-11-28: 16 MiB over TCP 34 -> 17 ms, within the host 7.8 -> 3.4 ms).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_DELAY_US = 100
#: One agent at a time is made: what is exchanged meanwhile belongs to NIXL's module.
_LOCK = threading.Lock()


@contextmanager
def resting_progress(bindings: Any) -> Iterator[None]:
    """Agents that are made within have a progress thread that sleeps between looks. `bindings`: NIXL's module."""
    with _LOCK:
        original: Any = getattr(bindings, "nixlAgentConfig", None)
        if not hasattr(original, "pthrDelay"):  # another NIXL: as it likes
            yield
            return
        setting = original.pthrDelay

        class Config(original):  # type: ignore[misc]
            @property
            def pthrDelay(self) -> Any:  # noqa: N802 - NIXL's name
                return setting.__get__(self)

            @pthrDelay.setter
            def pthrDelay(self, wanted: int) -> None:  # noqa: N802
                setting.__set__(self, max(wanted, _DELAY_US))

        bindings.nixlAgentConfig = Config
        try:
            yield
        finally:
            bindings.nixlAgentConfig = original
