"""The storage backends of this process, so that a change of weights can reach them."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol


class Suspendable(Protocol):
    def suspend(self) -> None: ...

    def resume(self) -> None: ...


_backends: weakref.WeakSet[Suspendable] = weakref.WeakSet()
_lock = threading.Lock()


def add(backend: Suspendable) -> None:
    with _lock:
        _backends.add(backend)


def remove(backend: Suspendable) -> None:
    with _lock:
        _backends.discard(backend)


def suspend_all() -> None:
    """Weights are about to change: from now on nothing is stored or served."""
    for backend in _snapshot():
        backend.suspend()


def resume_all() -> None:
    """SGLang has dropped all KV of the old weights from its own levels: suspended backends do so too, and go on."""
    for backend in _snapshot():
        backend.resume()


def _snapshot() -> list[Suspendable]:
    with _lock:
        return list(_backends)
