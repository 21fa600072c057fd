"""Finds what can be loaded for a request, decides whether it is worth it, and leases it until it has arrived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from operator import attrgetter

from dynamo_connectors.block_manager import BlockManager, Source
from dynamo_connectors.config import PEER
from dynamo_connectors.verdicts import damaged
from dynamo_connectors.vllm.compat import NULL_BLOCK_ID, engine_logger
from dynamo_connectors.vllm.handoff import Reach, wants_handoff
from dynamo_connectors.vllm.job_ledger import JobLedger, Running
from dynamo_connectors.vllm.live import Gate, Holds, Limits, Live, Tables
from dynamo_connectors.vllm.sharing import SharedLoads

log = engine_logger(__name__)


class Onboarding:
    """Adds to `counts`, by (what, label)."""

    def __init__(
        self,
        manager: BlockManager,
        limits: Limits,
        ledger: JobLedger,
        gate: Gate | None,
        counts: Counter[tuple[str, str]],
    ) -> None:
        self._manager = manager
        self._limits = limits
        self._geometry = limits.geometry
        self._ledger = ledger
        self._gate = gate
        self._counts = counts
        self._shared = SharedLoads()
        #: The group whose blocks stand for a prefix: when others ask whether to wait for it, and what it costs to load.
        self._main = next((i for i, group in enumerate(self._geometry.groups) if group.window_tokens is None), 0)
        self.holds: Holds | None = None
        #: The HBM blocks of loads that may run ahead. vLLM knows them as loaded, and would give them to anybody when
        #: their request goes: also to another connector, which waits for no stream.
        self._held: dict[str, Sequence[int]] = {}
        #: Requests whose blocks count as computed while their bytes are still on the way up.
        self.loading: dict[str, Live] = {}

    def matched_tokens(self, live: Live, computed_tokens: int) -> int | None:
        """How many tokens behind `computed_tokens` can be loaded; None to be asked again later."""
        live.local_tokens = computed_tokens
        live.has_run = False  # vLLM 0.33 may tell of an admission later than it counts the tokens of another's load
        if live.is_disappointed or self._shared.is_out_of_time(live.request_id):
            return 0
        # It ran ahead of its load and was preempted: one load of a request at a time.
        if live.request_id in self.loading or self._shall_wait(live):
            return None
        total = self._longest(live)
        if total > computed_tokens and self._gate is not None:
            total = self._worth_loading(live, self._gate, total)
        return total - computed_tokens

    def after_alloc(self, live: Live, tables: Tables, external_tokens: int) -> None:
        """The engine took up the offer: lease the blocks and plan their load into `tables`.

        It says so at every admission, also when there is nothing for us to load.
        """
        live.has_run = False
        if live.is_queued:
            live.is_queued = False
            wanted = self._geometry.longest_limit(live.request.num_tokens, len(live.chains.hashes)) - live.local_tokens
            self._counts["wanted_blocks", ""] += max(0, wanted) // self._main_tokens
        if external_tokens == 0:
            self.let_go(live)  # it computes everything: its peer need not wait for it
            return
        sources: list[Source] = []
        blocks: list[int] = []
        missing: list[int] = []
        total, why_missing = live.local_tokens + external_tokens, "evicted"
        for index, group in enumerate(self._geometry.groups):
            needed = group.needed(live.local_tokens, total)
            leased = self._reach(live).lease(live.chains.keys(index), needed.start, len(needed))
            targets = tables[index][needed.start : needed.stop]
            sources += leased
            blocks += targets[: len(leased)]
            missing += targets[len(leased) :]
        if len(blocks) != len(sources) or NULL_BLOCK_ID in blocks:
            # Which block is whose nobody can tell then, so none of them is loaded and the engine computes them.
            log.error("dynamo: request %s got %d blocks for %d to load", live.request_id, len(blocks), len(sources))
            self._manager.release([source for source in sources if source.tier != PEER])
            named = [*blocks, *missing]
            missing = [block for block in named if block != NULL_BLOCK_ID]
            # With one group vLLM computes from the first block that is named as lost.
            names_the_first = missing[:1] == named[:1] or len(self._geometry.groups) > 1
            assert missing, "a load into the null block alone"
            assert names_the_first, "a load into the null block"
            sources, blocks, why_missing = [], [], "internal_error"
        may_run_ahead = self.holds is not None and _outlives_its_load(live)
        # Of a request that is loaded whole vLLM computes the last token again, and writes it before its layer waits.
        by_layers = total < live.request.num_tokens
        ahead = self._ledger.load(live.request_id, sources, blocks, missing, may_run_ahead, by_layers)
        if ahead and self.holds is not None:
            self.holds.hold(blocks)
            self._held[live.request_id] = blocks
        self.loading[live.request_id] = live
        self._shared.begin(live.request_id, [source.key for source in sources])
        live.is_disappointed = bool(missing)
        self._counts["load_failures", why_missing] += len(missing)

    def end(self, job: Running) -> None:
        if job.loading is None:
            return
        live = self.loading.pop(job.loading)
        held = self._held.pop(job.loading, ())
        if self.holds is not None and held:
            self.holds.release(held)
        live.is_disappointed |= bool(job.failed)
        is_late = "timeout" in job.failed.values()
        self._shared.end(job.loading, is_late)
        here = [source for source in job.loads if source.tier != PEER]
        self._manager.release(here, damaged=damaged(job.failed))
        self.let_go(live)
        if self._gate is not None:
            # What came too late took its time like the rest; other failures say nothing about it.
            late: Counter[str] = Counter()
            if is_late:
                late.update(source.tier for source in job.loads if job.failed.get(source.key) == "timeout")
            for tier, num_bytes, seconds in job.moved:
                self._gate.observe_load(tier, num_bytes + late[tier] * self._limits.block_bytes, seconds)
        for reason in job.failed.values():
            self._counts["load_failures", reason] += 1
        good = [source for source in job.loads if source.key not in job.failed] if job.failed else job.loads
        hits = Counter(map(attrgetter("tier"), good))
        for tier, blocks in hits.items():
            self._counts["hit_blocks", tier] += blocks

    def prefetch(self, live: Live) -> None:
        """Brings what lies further down up to host memory, while the request waits for its turn."""
        for index, group in enumerate(self._geometry.groups):
            if group.window_tokens is None:
                self._manager.prefetch(live.chains.keys(index))

    def welcome(self, live: Live) -> None:
        """The request is new: a peer that has blocks for it keeps them while it waits for its turn."""
        if live.offer is not None and live.offer.is_leased:
            self._ledger.watch(live.offer.ticket)

    def leave(self, live: Live) -> None:
        """The request is gone. Who waits for its load goes on: what it loads now will not stay in HBM."""
        self._shared.leave(live.request_id)
        if live.request_id not in self.loading:
            self.let_go(live)

    def let_go(self, live: Live) -> None:
        """The peer may have its blocks back."""
        offer, live.offer = live.offer, None
        if offer is not None and offer.is_leased:
            self._ledger.unwatch(offer.ticket)

    def check(self) -> None:
        self._shared.check()
        assert self.loading.keys() == self._ledger.loading_requests(), "loading requests and load jobs differ"
        held = self.holds.held_blocks if self.holds is not None else 0
        assert held == sum(map(len, self._held.values())), "HBM holds and loads that may run ahead disagree"
        assert self._held.keys() <= self.loading.keys(), "HBM is held for a load that has ended"

    @property
    def _main_tokens(self) -> int:
        return self._geometry.groups[self._main].block_tokens

    def _shall_wait(self, live: Live) -> bool:
        keys, block = live.chains.keys(self._main), live.local_tokens // self._main_tokens
        if not self._limits.shares_loads or block >= len(keys):
            return False
        before = self._shared.num_waits
        waits = self._shared.must_wait(live.request_id, keys[block])
        self._counts["shared_loads", ""] += self._shared.num_waits - before
        return waits

    def _longest(self, live: Live, most_tokens: int | None = None) -> int:
        limit = self._geometry.longest_limit(live.request.num_tokens, len(live.chains.hashes))
        if most_tokens is not None:
            limit = min(limit, most_tokens)
        return self._geometry.longest_prefix(live.local_tokens, limit, partial(self._readable, live))

    def _readable(self, live: Live, group: int, start: int, stop: int) -> int:
        return min(stop - start, self._reach(live).match(live.chains.keys(group), start))

    def _reach(self, live: Live) -> Reach:
        return Reach(self._manager, live.offer, self._main_tokens)

    def _worth_loading(self, live: Live, gate: Gate, total: int) -> int:
        """The part of the prefix up to `total` tokens that is faster to load than to compute."""
        first, last = live.local_tokens // self._main_tokens, total // self._main_tokens
        run = self._tiers_of(live, first, last)
        admitted = gate.admit(run, self._limits.block_bytes * len(self._geometry.groups), self._main_tokens)
        if admitted >= len(run):
            return total
        self._counts["refused_blocks", ""] += len(run) - admitted
        return self._longest(live, live.local_tokens + admitted * self._main_tokens) if admitted else live.local_tokens

    def _tiers_of(self, live: Live, first: int, last: int) -> list[str]:
        chain = live.chains.keys(self._main)
        names: list[str] = []
        while first + len(names) < last:
            names += self._manager.tiers_of(chain, first + len(names), last)
            if first + len(names) < last:
                # A peer has it; or it is outside its window and not loaded at all.
                names.append(PEER if live.offer is not None else self._manager.tiers[-1].name)
        return names


def _outlives_its_load(live: Live) -> bool:
    """What a request leaves behind is kept when it ends, unless its load has not ended by then: nobody waits for it."""
    leaves = live.hints.pin_ttl_seconds or wants_handoff(live.request.kv_transfer_params)
    return live.request.max_tokens > 1 and not leaves
