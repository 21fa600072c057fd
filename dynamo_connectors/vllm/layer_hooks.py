"""Which steps may be computed while a load arrives layer by layer: those whose layers all ask before they read. Pure.

vLLM asks for a layer (`wait_for_layer_load`) where it computes its attention in Python. It asks for none in a step that
replays one CUDA graph, and for some models not for every layer. So nothing is believed: a kind of step is relied on
after one of that kind has asked for every layer, and what it does not ask for then is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_connectors.errors import DynamoConnectorsError


class LayerHooks:
    """`part_of`: layer -> the part of a block that holds its KV. Empty where no load arrives layer by layer."""

    def __init__(self, part_of: Mapping[str, int]) -> None:
        self._part_of = part_of
        self._reliable: set[str] = set()
        #: Of the step that is computed now; None: its layers do not ask.
        self._kind: str | None = None
        self._asked: set[str] = set()
        #: Its layers wait for loads.
        self._waits = False

    def begin(self, kind: str | None, has_loads: bool) -> bool:
        """A step begins that computes. Whether its layers will ask for the loads under way; else it waits for them."""
        self._asked.clear()
        self._kind = kind if self._part_of else None
        self._waits = has_loads and self._kind in self._reliable
        return self._waits

    @property
    def listens(self) -> bool:
        """Whether this step's layers have something to say: they wait, or this kind of step is not known yet."""
        return self._waits or (self._kind is not None and self._kind not in self._reliable)

    def ask(self, layer: str) -> int | None:
        """The part that `layer` is about to read; None: any."""
        self._asked.add(layer)
        return self._part_of.get(layer)

    def end(self, is_broken: bool = False) -> None:
        """The step was computed. Raises when a layer did not wait that had to, unless the step broke off."""
        kind, self._kind = self._kind, None
        waited, self._waits = self._waits, False
        if kind is None or is_broken:
            return
        silent = self._part_of.keys() - self._asked
        if not silent:
            self._reliable.add(kind)
        elif waited:
            self._reliable.clear()
            raise DynamoConnectorsError(
                f"{len(silent)} of {len(self._part_of)} layers were computed without waiting for their load, for "
                f"instance {min(silent)}; restart the engine with DYNAMO_KVBM_BY_LAYERS=off"
            )

    @property
    def may_come(self) -> bool:
        """Whether a load may arrive layer by layer: some kind of step waits for it so."""
        return bool(self._reliable)

    def check(self) -> None:
        assert self._part_of or not self._reliable, "steps are relied on without knowing the layers"
        assert not self._waits or self._kind in self._reliable, "a step waits that is not relied on"
