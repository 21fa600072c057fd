"""The storage backends of this process, so that a change of weights can reach them, also one that is attached later."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Protocol

from dynamo_connectors.sglang.l3_events import Removed, Stored


class LiveBackend(Protocol):
    def suspend(self) -> None: ...
    def resume(self) -> None: ...
    def note_use(self, request: str, keys: Sequence[str], prefix_keys: Sequence[str] | None) -> None: ...
    def describe(self, keys: Sequence[str], tokens: Sequence[int], parent: str | None) -> None: ...
    def routers_forgot(self) -> None: ...
    def take_events(self) -> tuple[list[Stored | Removed], int]: ...


class Registry:
    """Thread-safe. Holds its backends weakly."""

    def __init__(self) -> None:
        self._backends: weakref.WeakSet[LiveBackend] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._is_suspended = False
        #: Whether the weights may differ from those that the engine was started with.
        self.has_new_weights = False

    def add(self, backend: LiveBackend) -> None:
        with self._lock:
            self._backends.add(backend)
            is_suspended = self._is_suspended
        if is_suspended:
            backend.suspend()

    def remove(self, backend: LiveBackend) -> None:
        with self._lock:
            self._backends.discard(backend)

    def suspend_all(self) -> None:
        """Weights are about to change: from now on nothing is stored or served."""
        with self._lock:
            self._is_suspended = self.has_new_weights = True
        for backend in self.all():
            backend.suspend()

    def resume_all(self) -> None:
        """SGLang has dropped all KV of the old weights from its own levels: suspended backends do too, and go on."""
        with self._lock:
            self._is_suspended = False
        for backend in self.all():
            backend.resume()

    def check(self) -> None:
        assert self.has_new_weights or not self._is_suspended, "suspended without a change of weights"

    def all(self) -> list[LiveBackend]:
        with self._lock:
            return list(self._backends)


#: Of this process.
backends = Registry()
