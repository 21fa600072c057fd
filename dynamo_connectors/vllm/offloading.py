"""Offers a request's computed blocks to the block manager, and holds them in HBM until they are copied.

What is offered follows `request.block_hashes`, not what a step computed: blocks that arrived by a load, or that HBM
held all along, are kept too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynamo_connectors.admission import admitted_blocks
from dynamo_connectors.block_manager import BlockManager
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import HOST_DRAM
from dynamo_connectors.vllm.compat import NULL_BLOCK_ID
from dynamo_connectors.vllm.job_ledger import JobLedger, Running
from dynamo_connectors.vllm.live import ChangeSink, Holds, Limits, Live, Tables


@dataclass
class _Storing:
    slot: int
    #: Of the last block of a request that has ended: its chain.
    ended_chain: Sequence[BlockKey] = ()


class Offloading:
    """Adds to `counts`, by (what, label)."""

    def __init__(
        self,
        manager: BlockManager,
        limits: Limits,
        ledger: JobLedger,
        events: ChangeSink,
        counts: Counter[tuple[str, str]],
    ) -> None:
        self._manager = manager
        self._limits = limits
        self._ledger = ledger
        self._events = events
        self._counts = counts
        self.holds: Holds | None = None
        #: Blocks on their way to host memory.
        self._storing: dict[BlockKey, _Storing] = {}

    def offer(self, live: Live, computed_tokens: int, tables: Callable[[], Tables]) -> None:
        """Offloads those of the first `computed_tokens` tokens' full blocks that are not kept below HBM yet."""
        if self.holds is None or live.hints.no_store:
            return
        limits = [self._admitted(live, group, computed_tokens) for group in range(len(live.offered))]
        if not any(limit > offered for limit, offered in zip(limits, live.offered, strict=True)):
            return
        if not live.is_noted:
            live.is_noted = True
            for group in range(len(limits)):
                self._manager.note_use(live.chains.keys(group))
        for group, (limit, table) in enumerate(zip(limits, tables(), strict=True)):
            self._offer_group(live, group, min(limit, len(table)), table)

    def finish(self, live: Live, computed_tokens: int, tables: Tables) -> None:
        """The request is done: its blocks count as just used, and what came in meanwhile goes on down."""
        if self.holds is None or live.hints.no_store:
            return
        for group, offered in enumerate(live.offered):
            chain = live.chains.keys(group)[:offered]
            # Once per request, not per block: its head came in first, and must not be the first to go.
            self._manager.touch(chain)
            self._manager.offload(chain)
            last = next((key for key in reversed(chain) if key in self._storing), None) if self._storing else None
            if last is not None:
                self._storing[last].ended_chain = chain
            lost = tables[group][offered : self._admitted(live, group, computed_tokens)]
            self._counts["dropped_blocks", "hbm_busy"] += sum(block != NULL_BLOCK_ID for block in lost)

    def pin(self, live: Live, until: float) -> None:
        """Keeps the request's blocks below HBM until then, as far as the pins' share of the tiers goes."""
        for group, offered in enumerate(live.offered):
            self._manager.pin(live.chains.keys(group)[:offered], until)

    def end(self, job: Running) -> None:
        if not job.stores:
            return
        assert self.holds is not None
        self.holds.release([block for _, block in job.stores])
        ended: list[Sequence[BlockKey]] = []
        for target, _ in job.stores:
            # Between a reset and its end a block may be on its way twice.
            storing = self._storing.get(target.key)
            if storing is not None and storing.slot == target.slot:
                del self._storing[target.key]
                if storing.ended_chain:
                    ended.append(storing.ended_chain)
        for target, _ in job.stores if job.failed else ():
            if target.key in job.failed:
                self._manager.abort(target, job.failed[target.key])
        good = [target for target, _ in job.stores if target.key not in job.failed]
        self._manager.commit_all(good)
        self._counts["offloaded_blocks", HOST_DRAM] += len(good)
        # A chunk is complete only now, and no request will come back to say so.
        for chain in ended:
            self._manager.offload(chain)

    def on_their_way(self, keys: Sequence[BlockKey]) -> set[BlockKey]:
        """Those of `keys` that are being copied to host memory."""
        return set(keys) & self._storing.keys()

    def _admitted(self, live: Live, group: int, computed_tokens: int) -> int:
        """How many of the group's first blocks may be offloaded by now."""
        block_tokens = self._limits.geometry.groups[group].block_tokens
        full = min(len(live.chains.keys(group)), computed_tokens // block_tokens)
        return admitted_blocks(full, self._limits.offload_ratio)

    def _offer_group(self, live: Live, group: int, limit: int, table: Sequence[int]) -> None:
        assert self.holds is not None
        start = live.offered[group]
        limit = min(limit, start + self._limits.max_held_blocks - self.holds.held_blocks)
        if limit <= start:
            return
        keys = live.chains.keys(group)
        # Blocks that the attention window has left are the engine's null block: their bytes are gone.
        block_of = {keys[index]: table[index] for index in range(start, limit) if table[index] != NULL_BLOCK_ID}
        self._events.describe(live.request, group, start, keys[start:limit])
        live.offered[group] = limit
        targets = self._manager.reserve(block_of, keys[start - 1] if start else None)
        if targets:
            stores = tuple((target, block_of[target.key]) for target in targets)
            self.holds.hold([block for _, block in stores])
            self._storing.update((target.key, _Storing(target.slot)) for target in targets)
            self._ledger.store(stores)
