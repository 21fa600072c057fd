"""The scheduler half: owns the index, decides what is loaded and offloaded, and never touches a byte.

Life of a load:     matched_tokens -> after_alloc (lease) -> plan (LoadJob) -> worker_reports (release)
Life of an offload: offer (reserve, hold the HBM block) -> plan (StoreJob) -> worker_reports (commit or abort, let go)
Life of a move:     plan (take_moves, MoveJob) -> worker_reports (end_move)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dynamo_connectors.block_manager import BlockManager
from dynamo_connectors.config import HOST_DRAM, NVME_SSD, OBJECT_STORE
from dynamo_connectors.tiers.index_stats import IndexStats
from dynamo_connectors.verdicts import is_damage
from dynamo_connectors.vllm.adapters import Adapters
from dynamo_connectors.vllm.compat import engine_logger
from dynamo_connectors.vllm.fetch import name_of, wants_name, what_peers_have
from dynamo_connectors.vllm.groups import Chains
from dynamo_connectors.vllm.handoff import UNSIGNED, Exports, Identity, Trust, wants_handoff
from dynamo_connectors.vllm.hints import PEER, parse_hints
from dynamo_connectors.vllm.job_ledger import JobLedger, Running
from dynamo_connectors.vllm.live import ChangeSink, Gate, Holds, Limits, Live, Tables
from dynamo_connectors.vllm.messages import StepPlan, WorkerReports
from dynamo_connectors.vllm.offloading import Offloading
from dynamo_connectors.vllm.onboarding import Onboarding
from dynamo_connectors.vllm.recovery import Finds, Recovery
from dynamo_connectors.vllm.step_clock import FEWEST_PREFILL_TOKENS, StepClock

log = engine_logger(__name__)

#: The first requests wait no longer for a list, however patient reads of the store may be.
_LONGEST_FIND_SECONDS = 2.0


#: How long an idle engine goes on stepping for copies between the tiers below HBM, after its last request. vLLM puts
#: off sleep, pause and exit meanwhile.
MOVES_SECONDS = 5.0


class SchedulerHalf:
    """One per engine. Called by vLLM's scheduler only, so it needs no lock. `clock` gives seconds."""

    def __init__(
        self,
        manager: BlockManager,
        limits: Limits,
        events: ChangeSink,
        gate: Gate | None,
        clock: Callable[[], float],
    ) -> None:
        self._manager = manager
        self._limits = limits
        self._events = events
        self._gate = gate
        self._clock = clock
        self._requests: dict[str, Live] = {}
        #: What happened since the last `take_counts`, by (what, label).
        self._counts: Counter[tuple[str, str]] = Counter()
        self._ledger = JobLedger(limits.num_workers)
        self._onboarding = Onboarding(manager, limits, self._ledger, gate, self._counts)
        self._offloading = Offloading(manager, limits, self._ledger, events, self._counts)
        self._exports: Exports | None = None
        self._recovery = Recovery(limits.num_workers, limits.lasting_tiers)
        #: Until when requests wait for it, from the first one on.
        self._finds_due: float | None = None
        #: When the last request left.
        self._left_at = clock()
        self._steps = StepClock()
        #: Prompt tokens of the step that is being planned.
        self._step_prefill = 0
        self._adapters = Adapters()
        #: Workers still have to hear of a reset; what they found from before it must not come back.
        self._forget_next = False
        self._was_reset = False
        #: Whose blocks may be loaded; None: nobody's.
        self._trust: Trust | None = None
        #: What requests call this engine that may be answered with its blocks; empty when it serves nobody.
        self._name = ""

    def bind_holds(self, stored: Holds, loaded: Holds) -> None:
        """For blocks that are copied from HBM, and for those that are copied to it. Without them nothing is stored."""
        self._offloading.holds, self._onboarding.holds = stored, loaded

    def take_role(self, identity: Identity | None, trust: Trust | None) -> None:
        """`identity`: where peers may read this engine's blocks; `trust`: this engine may read theirs."""
        self._trust = trust
        if identity is not None:
            self._name = name_of(identity)
            self._exports = Exports(identity, self._manager, self._ledger, self._counts)

    def new_request(self, request: Any) -> None:
        live = self._live(request)
        self._onboarding.welcome(live)
        if live.hints.prefetch or any(other.is_queued for other in self._requests.values() if other is not live):
            self._onboarding.prefetch(live)

    def matched_tokens(self, request: Any, computed_tokens: int) -> int | None:
        """How many tokens behind `computed_tokens` can be loaded; None: ask again in the next step."""
        live = self._live(request)
        waits = self._waits_for_finds(live, computed_tokens)
        return None if waits else self._onboarding.matched_tokens(live, computed_tokens)

    def after_alloc(self, request: Any, tables: Tables, external_tokens: int) -> None:
        """The request has HBM blocks; `external_tokens` of what was offered shall be loaded into them."""
        self._onboarding.after_alloc(self._live(request), tables, external_tokens)

    def offer(self, request_id: str, computed_tokens: int, scheduled_tokens: int, tables: Callable[[], Tables]) -> None:
        """Offloads what is not kept below HBM yet, of the computed tokens and of those that this step computes.

        Of the latter only the prompt's: they are final, and a sliding window lets go of their blocks in the next step.
        A request whose load is still running is left alone: its blocks count as computed, their bytes are not there.
        So is everything while a load within a step may still fail, and is offered after that.
        """
        live = self._requests.get(request_id)
        if live is None:
            return
        live.has_run = True
        if request_id not in self._onboarding.loading and not self._steps.is_in_doubt:
            certain = min(computed_tokens + scheduled_tokens, live.request.num_prompt_tokens)
            self._offloading.offer(live, max(computed_tokens, certain), tables)

    def finished(self, request: Any, tables: Tables, computed_tokens: int, is_answered: bool = False) -> None:
        """Offers the last blocks. vLLM may free them all now: the ones being copied are held until they are copied.

        Of an answered request every step has ended well; one that is aborted may count on a step that still fails.
        """
        request_id = request.request_id
        live = self._requests.pop(request_id, None)
        if live is None:
            return
        self._left_at = self._clock()
        self._onboarding.leave(live)
        if request_id in self._onboarding.loading:
            return
        is_certain = live.has_run and (is_answered or not self._steps.is_in_doubt)
        kept_tokens = computed_tokens if is_certain else 0
        self._offloading.offer(live, kept_tokens, lambda: tables)
        self._offloading.finish(live, kept_tokens, tables)
        if live.hints.pin_ttl_seconds:
            self._offloading.pin(live, self._clock() + live.hints.pin_ttl_seconds)

    def hand_off(self, request: Any, computed_tokens: int) -> dict[str, Any] | None:
        """After `finished`: what other engines must know to get its KV, for `kv_transfer_params`."""
        if self._exports is None:
            return None
        if not wants_handoff(request.kv_transfer_params):
            return {PEER: self._name} if wants_name(request.kv_transfer_params) else None
        geometry = self._limits.geometry
        block_tokens = geometry.groups[0].block_tokens
        keys = Chains(geometry, request.block_hashes, self._adapters.name_of(request)).keys(0)
        chain = list(keys[: computed_tokens // block_tokens])
        return self._exports.begin(chain, self._offloading.on_their_way(chain), block_tokens)

    def step_planned(self, computed: Mapping[str, int], scheduled: Mapping[str, int], may_fail: bool = False) -> None:
        """Tokens of each request that were computed before the step, and that are computed in it.

        `may_fail`: another connector loads some of the former within the step.
        """
        prefill = 0
        for request_id, tokens in scheduled.items():
            live = self._requests.get(request_id)
            if live is not None:
                prefill += max(0, min(tokens, live.request.num_prompt_tokens - computed.get(request_id, 0)))
        self._step_prefill = prefill
        self._steps.planned(self._clock(), prefill, sum(scheduled.values()), may_fail)
        if scheduled.keys() & self._onboarding.loading.keys():
            self._steps.may_wait()

    def step_ended(self) -> None:
        prefill = self._steps.ended(self._clock())
        if prefill is not None and self._gate is not None:
            self._gate.observe_prefill(prefill.tokens, prefill.seconds)

    def plan(self, is_idle: bool) -> StepPlan:
        """The jobs that workers start in this step."""
        self._manager.expire_pins(self._clock())
        # A move could overwrite what a worker has found on its disk and not told yet.
        if not self._recovery.is_open(NVME_SSD):
            self._ledger.move(self._manager.take_moves())
        self._ledger.erase(self._manager.take_erasures())
        forget, self._forget_next = self._forget_next, False
        hides_loads = not is_idle and self._hides_loads()
        if hides_loads:
            self._steps.may_wait()
        return self._ledger.take_plan(forget, is_idle, hides_loads)

    def worker_reports(self, reports: WorkerReports) -> None:
        self._recover(reports.finds)
        if self._gate is not None:
            for tier, rate in reports.rates.items():
                self._gate.expect_load(tier, rate)
        for job in self._ledger.hear(reports):
            self._offloading.end(job)
            self._onboarding.end(job)
            self._end_moves(job)
            if self._exports is not None:
                self._exports.end(job)
                self._exports.stored({target.key for target, _ in job.stores})
            for erasure in job.erasures:
                self._manager.end_erasure(erasure)
        self._publish()

    def reset(self) -> bool:
        """Weights changed or the user asked: nothing kept so far may be served again.

        False while a load is running: its request would still get the old bytes, so the caller has to ask again.
        """
        self._manager.clear()
        self._forget_next = self._was_reset = True
        for live in self._requests.values():
            live.offered = [0] * len(live.offered)
            if live.request_id not in self._onboarding.loading:  # else when its load ends
                self._onboarding.let_go(live)
        self._publish()
        return not self._onboarding.loading

    @property
    def held_blocks(self) -> int:
        """HBM blocks that are kept from new requests until they are copied."""
        holds = self._offloading.holds
        return holds.held_blocks if holds is not None else 0

    @property
    def has_work(self) -> bool:
        """Whether an idle engine must keep stepping: to see a job end, to start one, or to hear what survived.

        Moves are waited for `MOVES_SECONDS` at most; those under way go on, and the next step hears how they ended.
        """
        if self._ledger.has_urgent or self._forget_next or self._recovery.is_open(NVME_SSD):
            return True
        if not self._requests and self._clock() - self._left_at >= MOVES_SECONDS:
            return False
        return self._ledger.has_moves or self._manager.has_moves_waiting

    def take_events(self) -> Iterable[Any]:
        return self._events.take()

    def tier_stats(self) -> Mapping[str, IndexStats]:
        return self._manager.stats()

    def take_counts(self) -> Mapping[tuple[str, str], int]:
        counts = Counter(self._counts)
        self._counts.clear()
        for reason, blocks in self._manager.dropped.items():
            counts["dropped_blocks", reason] += blocks
        self._manager.dropped.clear()
        return counts

    def check(self) -> None:
        self._manager.check()
        self._ledger.check()
        self._onboarding.check()
        self._recovery.check()
        if self._exports is not None:
            self._exports.check()
        assert self.held_blocks == self._ledger.held_blocks(), "HBM holds and running stores disagree"

    def _hides_loads(self) -> bool:
        """Whether the step that is being planned will hardly end before those of its loads that may run ahead."""
        blocks = self._ledger.blocks_ahead()
        if not blocks or self._gate is None or not self._limits.copies_beside:
            return False
        loading = self._gate.expected_load_seconds(HOST_DRAM, blocks * self._limits.block_bytes)
        step = self._steps.least_seconds
        if self._step_prefill >= FEWEST_PREFILL_TOKENS:
            step = max(step, self._gate.expected_step_seconds(self._step_prefill))
        return loading is not None and loading <= step

    def _live(self, request: Any) -> Live:
        live = self._requests.get(request.request_id)
        if live is None:
            hints, problems = parse_hints(getattr(request, "kv_transfer_params", None))
            for problem in problems:
                log.warning("dynamo: request %s: %s; ignored", request.request_id, problem)
            self._counts["ignored_hints", ""] += len(problems)
            geometry = self._limits.geometry
            chains = Chains(geometry, request.block_hashes, self._adapters.name_of(request))
            live = Live(request, chains, hints, [0] * len(geometry.groups))
            # After a reset this engine takes nothing from anybody.
            if self._trust is not None and not self._was_reset:
                live.offer, problem = what_peers_have(request.kv_transfer_params, self._trust, self._name)
                self._counts["nixl_peer_hints", ""] += live.offer is not None and not live.offer.is_leased
                if problem == UNSIGNED:
                    self._counts["nixl_refused_messages", "unsigned_ticket"] += 1
                if problem:
                    log.warning("dynamo: request %s: %s", request.request_id, problem)
                    self._counts["ignored_hints", ""] += 1
            self._requests[request.request_id] = live
        return live

    def _waits_for_finds(self, live: Live, computed_tokens: int) -> bool:
        """Right after a start an object store may still be listing what it holds, which after a reset is nothing."""
        if not self._recovery.any_open or self._was_reset:
            return False
        if computed_tokens >= self._limits.geometry.longest_limit(live.request.num_tokens, len(live.chains.hashes)):
            return False
        now = self._clock()
        if self._finds_due is None:
            self._finds_due = now + min(self._limits.find_seconds, _LONGEST_FIND_SECONDS)
        if now < self._finds_due:
            return True
        if not live.is_early:
            live.is_early = True
            self._counts["early_requests", ""] += 1
        return False

    def _recover(self, finds: Finds) -> None:
        for tier, entries in self._recovery.hear(finds).items():
            if self._was_reset:
                continue
            (named,) = [named for named in self._manager.tiers if named.name == tier]
            if tier == OBJECT_STORE:
                # Any free number will do; those in use already are counted from below.
                last = named.index.capacity_blocks - 1
                entries = [(last - index, key) for index, (_, key) in enumerate(entries)]
            recovered = self._manager.restore(tier, entries) * named.chunk_blocks
            self._counts["recovered_blocks", tier] += recovered
            log.info("dynamo: tier %s has %d blocks of an earlier run", tier, recovered)

    def _end_moves(self, job: Running) -> None:
        for move in job.moves:
            reason = job.failed.get(move.key)
            going_up = move.target_tier == HOST_DRAM
            # A write that failed says nothing about what was to be written.
            damaged = reason is not None and (is_damage(reason) if going_up else reason == "wrong_key")
            # Where several workers write, one may have stored its part of what the others lost.
            self._manager.end_move(move, reason is None, damaged, sent=job.is_sent)
            if reason is None:
                what = "prefetched_blocks" if going_up else "offloaded_blocks"
                self._counts[what, move.target_tier] += 1
            else:
                self._counts["move_failures", reason] += 1

    def _publish(self) -> None:
        self._events.publish(self._manager.take_changes())
