"""Requests that want blocks which another request is loading wait for that load instead of doing it again. Pure.

When the load ends, its blocks are in HBM and the engine's own prefix cache finds them; all waiters go on in the same
step (vLLM #44294 is what happens when they go on one by one). A waiter never depends on the loader's luck: a load that
fails, or whose request leaves, is no longer shared, and who has waited `_PATIENCE` times loads for itself. Who has
waited for a load that took all the time that loads have has no time left for one of its own: it computes.
"""

from __future__ import annotations

from collections.abc import Iterable

from dynamo_connectors.blocks import BlockKey

#: Loads that one request waits for before it loads for itself.
_PATIENCE = 2


class SharedLoads:
    """Which blocks are being loaded, by which request, and who waits for them."""

    def __init__(self) -> None:
        #: block -> the request whose load others may wait for.
        self._loader_of: dict[BlockKey, str] = {}
        self._blocks_of: dict[str, list[BlockKey]] = {}
        #: waiter -> the loaders it has waited for, the current one last.
        self._waited_for: dict[str, list[str]] = {}
        #: Who has waited for a load that came too late.
        self._out_of_time: set[str] = set()
        #: Waits begun so far.
        self.num_waits = 0

    def begin(self, loader: str, keys: Iterable[BlockKey]) -> None:
        """`loader` has started to load `keys`. Blocks somebody else loads at the same time stay with him."""
        mine = [key for key in keys if key not in self._loader_of]
        self._blocks_of[loader] = mine
        self._loader_of.update(dict.fromkeys(mine, loader))
        self._waited_for.pop(loader, None)

    def end(self, loader: str, is_late: bool = False) -> None:
        """The load is over, or nobody shall wait for it any more. Idempotent."""
        for key in self._blocks_of.pop(loader, ()):
            del self._loader_of[key]
        if is_late:
            self._out_of_time |= {waiter for waiter, loaders in self._waited_for.items() if loaders[-1] == loader}

    def is_out_of_time(self, waiter: str) -> bool:
        return waiter in self._out_of_time

    def must_wait(self, waiter: str, wanted: BlockKey) -> bool:
        """Whether `waiter`, whose next missing block is `wanted`, shall ask again later."""
        loader = self._loader_of.get(wanted)
        if loader is None:
            return False
        waited_for = self._waited_for.setdefault(waiter, [])
        if loader in waited_for:
            return True
        if len(waited_for) == _PATIENCE:
            return False
        waited_for.append(loader)
        self.num_waits += 1
        return True

    def leave(self, request_id: str) -> None:
        """The request is gone: nobody waits for it, and it waits for nobody."""
        self.end(request_id)
        self._waited_for.pop(request_id, None)
        self._out_of_time.discard(request_id)

    def check(self) -> None:
        blocks = {key: loader for loader, keys in self._blocks_of.items() for key in keys}
        assert blocks == self._loader_of, "the two maps of shared loads differ"
        assert self._out_of_time <= self._waited_for.keys(), "a request is out of time that has waited for nobody"
        assert all(len(loaders) <= _PATIENCE for loaders in self._waited_for.values()), "a request waits for too many"
