"""Read by every Python that has this folder on its path: an engine under soak compares each block that it copies.

Each comparison is one line in the file that the environment names: what was copied, and how it differs, if it does.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

WATCHED = "dynamo_connectors.transfer"


class _Hook(importlib.abc.MetaPathFinder):
    """Arms the transfer engine once, when its module is imported: nothing of the engine is imported for it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _arm(module.TransferEngine)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _arm(engine: Any) -> None:
    import numpy as np

    from soak.truth import FAULTS_VARIABLE, RIGHT, ROWS_VARIABLE, UNKNOWN, difference, load_rows

    rows = load_rows(Path(os.environ[ROWS_VARIABLE]))
    faults = Path(os.environ[FAULTS_VARIABLE])
    store, load, run_ahead = engine._store, engine._load, engine.run_ahead

    def compare(what: str, key: bytes, row: bytes | memoryview) -> None:
        line = difference(rows, bytes(key), np.frombuffer(row, dtype=np.float32))
        with faults.open("a") as file:
            verdict = f"{what}, {line}" if line is not None else what + (RIGHT if bytes(key) in rows else UNKNOWN)
            file.write(verdict + "\n")

    def compare_loaded(self: Any, items: Sequence[Any]) -> None:
        for item in items:
            parts = [part[item.block].numpy().tobytes() for part in self._copy._hbm.parts]
            compare(f"loaded from {item.tier}", item.key, b"".join(parts))

    def watched_store(self: Any, job: Any, fence: Any) -> Any:
        outcome = store(self, job, fence)
        for item in job.items:
            compare("stored", item.key, memoryview(self._dram.rows[item.slot]))
        return outcome

    def watched_load(self: Any, job: Any, *rest: Any) -> Any:
        outcome = load(self, job, *rest)
        compare_loaded(self, [item for item in job.items if item.key not in outcome.failed])
        return outcome

    def watched_run_ahead(self: Any, job: Any, **chosen: Any) -> bool:
        # On the CPU the bytes are there when it returns.
        runs = bool(run_ahead(self, job, **chosen))
        if runs:
            compare_loaded(self, job.items)
        return runs

    engine._store, engine._load, engine.run_ahead = watched_store, watched_load, watched_run_ahead


if "DYNAMO_SOAK_ROWS" in os.environ:
    sys.meta_path.insert(0, _Hook())
