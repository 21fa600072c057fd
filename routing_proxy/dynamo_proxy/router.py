"""Places a request: gathers candidates and what they hold, asks the policy, charges the ledger. One
synchronous call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from types import MappingProxyType
from typing import Final, Literal, final

from . import policy
from .engines import Engine, EngineRegistry, Fleet
from .hints import HINT_KINDS, LEAST_GAIN_TOKENS, NO_HINTS, NO_REACHES, Hints, Reach, choose_hints
from .hints import gains as peer_gains
from .knowledge import Knowledge
from .learning import CostLearner
from .ledger import Lease, Ledger
from .metrics import Metrics
from .sessions import Sessions, number_of
from .speeds import Speeds
from .text_chain import Prompt

NO_GAINS: Final[Mapping[int, int]] = MappingProxyType({})
NO_TIERS: Final[Mapping[str, int]] = MappingProxyType({})
# Why nobody takes a request: no engine is ready; who serves its model takes none now; who may serve it has not told its
# models yet; nobody serves it.
Standing = Literal["no_engine", "not_now", "not_told", "unknown"]


@final
class Placement:
    """A charged decision. Whoever holds it releases the lease."""

    __slots__ = ("decision", "engine", "hints", "lease", "peer_tokens", "prompt_tokens", "queued_tokens", "tiers")

    def __init__(
        self, engine: Engine, lease: Lease, decision: policy.Decision, queued_tokens: int, prompt_tokens: int
    ) -> None:
        self.engine = engine
        self.lease = lease
        self.decision = decision
        self.queued_tokens = queued_tokens  # prefill ahead of it when it was placed
        self.prompt_tokens = prompt_tokens
        self.hints = NO_HINTS  # for its engine
        self.peer_tokens = 0  # that a peer holds, of those that its engine lacks
        self.tiers = NO_TIERS  # where its engine holds how many tokens of it, if that is to be explained


@dataclass(slots=True)
class RoutingState:
    """What the rules remember between requests."""

    mode: str = "kv"
    learner: CostLearner = field(default_factory=CostLearner)
    overlap: policy.OverlapRule | None = None  # Dynamo's rule in the place of ours
    temperature: float = 0.0
    prefill: policy.PrefillRule = field(default_factory=policy.PrefillRule)
    last_slot: int = -1
    last_prefill_slot: int = -1
    warm_up_seconds: float = 10.0  # how long an engine that is new among others gets less; 0: not at all
    max_in_flight: int = 0  # requests an engine may have; 0: as many as come
    speeds: Speeds = field(default_factory=Speeds)
    sessions: Sessions | None = None  # None: requests of a session go where they like


class Router:
    """The one place where an engine is picked and charged, and where leases end."""

    def __init__(
        self, registry: EngineRegistry, ledger: Ledger, knowledge: Knowledge, metrics: Metrics, rng: Random
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._knowledge = knowledge
        self._metrics = metrics
        self._tallies = metrics.tallies
        self._rng = rng
        self.state = RoutingState()
        self._on_failure: Callable[[Engine, str], None] = lambda engine, reason: None
        self._on_slow: Callable[[Engine], None] = lambda engine: None
        self._on_room: Callable[[], None] | None = None

    def when_failed(self, call: Callable[[Engine, str], None]) -> None:
        """Name who hears that a request failed on an engine."""
        self._on_failure = call

    def when_slow(self, call: Callable[[Engine], None]) -> None:
        """Name who hears that an engine is far slower than the others."""
        self._on_slow = call

    def when_room(self, call: Callable[[], None]) -> None:
        """Name who hears that an engine may have room again."""
        self._on_room = call

    def has_room(self, model: str) -> bool:
        """True unless every engine that could take such a request has as many as it may have."""
        limit, loads = self.state.max_in_flight, self._registry.fleet(model, 0).loads
        return not limit or not loads or any(load.in_flight < limit for load in loads)

    def place(self, prompt: Prompt, tried: int, now: float) -> Placement | None:
        """Pick an engine not yet in the bitmask `tried`, or None if there is none."""
        fleet = self._registry.fleet(prompt.model, tried)
        loads: Sequence[policy.Load] = fleet.loads
        if not loads:
            return None
        tokens = self._knowledge.prompt_tokens(prompt)
        own: policy.Held = self._knowledge.matched_tokens(prompt, fleet.mask, now)
        held = own
        state, reaches, gains, peer_tokens = self.state, NO_REACHES, NO_GAINS, 0
        if fleet.peers and tokens >= LEAST_GAIN_TOKENS:
            reaches, gains, held = self._beside_peers(prompt, fleet, own)
        if state.max_in_flight:
            loads = tuple(load for load in loads if load.in_flight < state.max_in_flight) or loads
        if self._registry.warming:
            loads = self._warmed(loads, now)
        if prompt.slo is not None and state.mode == "kv":
            capped, model = self._capped(loads, held, tokens), state.learner.model
            loads = policy.in_time(loads, capped, tokens, model, prompt.slo.ttft_seconds)
        if prompt.session and state.sessions is not None:
            decision = self._choose_for_session(loads, held, tokens, prompt.session, now)
        else:
            decision = self._choose(loads, self._capped(loads, held, tokens), tokens)
        if self._registry.has_prefill:
            decision.matched_tokens = min(held.get(decision.slot, 0), tokens)
            decision.new_tokens = tokens - decision.matched_tokens
        if gains:
            decision.matched_tokens = min(own.get(decision.slot, 0), tokens)
            peer_tokens = gains.get(decision.slot, 0)
        queued = self._ledger.loads[decision.slot].pending_tokens
        lease = self._ledger.charge(decision.slot, decision.new_tokens, tokens)
        engine = self._registry.at(decision.slot)
        placement = Placement(engine, lease, decision, queued, tokens)
        placement.peer_tokens = peer_tokens
        if engine.runs_connector:
            placement.hints = self._hints(engine, prompt, fleet, reaches, queued)
        if prompt.explained:
            placement.tiers = self._knowledge.tiers(prompt, decision.slot)
        self._knowledge.sent(decision.slot, prompt, now)
        self._tallies.decided(state.mode, decision.reason)
        if not tried:
            state.last_slot = decision.slot
            self._tallies.routed(tokens, decision.matched_tokens)
        if engine.breaker.score:
            engine.breaker.began()
        return placement

    def place_prefill(self, prompt: Prompt, placement: Placement, now: float, in_room: bool = False) -> Placement | str:
        """Pick the engine that computes the prompt for the one of `placement`, and charge it; or say why none does.

        `in_room`: that engine cannot do without.
        """
        state, decision, slot = self.state, placement.decision, placement.engine.slot
        tokens, rule = placement.prompt_tokens, self.state.prefill
        if decision.new_tokens <= rule.min_tokens and not in_room:
            return "short"
        fleet = self._registry.prefill_fleet(prompt.model, slot, in_room)
        loads = fleet.loads
        if not loads:
            return "tripped" if self._registry.has_prefill_for(prompt.model, slot, in_room) else "no_engine"
        if rule.max_queued_tokens >= 0 and not in_room:
            loads = tuple(load for load in loads if load.pending_tokens <= rule.max_queued_tokens)
            if not loads:
                return "queue_full"
        own: policy.Held = self._knowledge.matched_tokens(prompt, fleet.mask, now)
        held, reaches, gains = own, NO_REACHES, NO_GAINS
        if fleet.peers and tokens >= LEAST_GAIN_TOKENS:
            reaches, gains, held = self._beside_peers(prompt, fleet, own)
        chosen = self._choose(loads, held, tokens, state.last_prefill_slot)
        chosen.matched_tokens = min(own.get(chosen.slot, 0), tokens)
        there, here = self._ledger.loads[chosen.slot], self._ledger.loads[slot]
        if rule.max_queued_tokens < 0 and not in_room:
            # Its own charge does not wait for itself.
            here = replace(here, in_flight=here.in_flight - 1, pending_tokens=placement.queued_tokens)
            new = decision.new_tokens, chosen.new_tokens
            if not policy.is_sooner_elsewhere(here, new[0], there, new[1], tokens, state.learner.model):
                return "later"
        state.last_prefill_slot = chosen.slot
        queued = there.pending_tokens
        lease = self._ledger.charge(chosen.slot, chosen.new_tokens, tokens)
        self._ledger.expect_prefill(placement.lease, 0)
        engine = self._registry.at(chosen.slot)
        found = Placement(engine, lease, chosen, queued, tokens)
        found.peer_tokens = gains.get(chosen.slot, 0)
        if engine.runs_connector:
            found.hints = self._hints(engine, prompt, fleet, reaches, queued)
        self._knowledge.sent(chosen.slot, prompt, now)
        if engine.breaker.score:
            engine.breaker.began()
        return found

    def prefill_came_back(self, placement: Placement) -> None:
        """The engine of `placement` computes the prompt itself after all."""
        self._ledger.expect_prefill(placement.lease, placement.decision.new_tokens)

    def first_byte(self, placement: Placement, first_token_seconds: float) -> None:
        """The first body byte came: stop counting its prefill. Learn, if the time to a first token is known
        (above 0).
        """
        learner, new, tokens = self.state.learner, placement.decision.new_tokens, placement.prompt_tokens
        self._ledger.prefilled(placement.lease, learner.model.prefill_seconds(new, tokens))
        if first_token_seconds:
            predicted = learner.model.t_0 + learner.model.t_p * placement.queued_tokens
            predicted += learner.model.prefill_seconds(new, tokens)
            if self.state.speeds.observe(placement.engine.slot, predicted, first_token_seconds):
                self._on_slow(placement.engine)
            if placement.peer_tokens:
                lacked = tokens - placement.decision.matched_tokens
                learner.fetched(first_token_seconds, placement.queued_tokens, lacked, placement.peer_tokens, tokens)
            else:
                learner.first_token(first_token_seconds, placement.queued_tokens, new, tokens)

    def stream_ended(self, placement: Placement, events: int, seconds: float) -> None:
        """A stream came to its end: so many events, the last one `seconds` after the first."""
        load, beside = self._ledger.loads[placement.engine.slot], self._ledger.seconds_beside(placement.lease)
        self.state.learner.stream_ended(seconds, events, load, beside)

    def release(self, placement: Placement) -> None:
        """The request left its engine."""
        self._ledger.release(placement.lease)
        if placement.engine.breaker.score:
            placement.engine.breaker.left()
        if self._on_room is not None:
            self._on_room()

    def another(self, prompt: Prompt, tried: int) -> bool:
        """True if an untried engine could take this prompt."""
        return bool(self._registry.fleet(prompt.model, tried).loads)

    def max_model_tokens(self, model: str) -> int:
        """The context that every engine of this model has, in tokens; 0: not known."""
        known = [e.models.max_model_tokens for e in self._registry if e.models is not None and e.serves(model)]
        return min(known, default=0)

    def standing(self, model: str) -> Standing:
        """Why no engine takes a request for this model."""
        if not self._registry.any_ready():
            return "no_engine"
        able = [engine for engine in self._registry if engine.may_serve(model)]
        if any(engine.models is not None for engine in able):
            return "not_now"
        return "not_told" if able else "unknown"

    def failed(self, engine: Engine, reason: str) -> None:
        """A request failed on an engine: health looks again, at once."""
        self._on_failure(engine, reason)

    def _beside_peers(
        self, prompt: Prompt, fleet: Fleet, own: policy.Held
    ) -> tuple[Mapping[int, Reach], Mapping[int, int], policy.Held]:
        """Where the prompt lies, how much more of it a peer of each engine holds, and what engines hold with the worth
        of that.
        """
        mask = sum((1 << peer for peer in fleet.peers if not fleet.mask >> peer & 1), fleet.mask)
        reaches = self._knowledge.reaches(prompt, mask)
        learner = self.state.learner
        gains = peer_gains(fleet.readers, reaches, fleet.peers) if learner.counts_peers else NO_GAINS
        worth = learner.peer_worth
        if not gains or not worth:
            return reaches, gains, own
        return reaches, gains, {**own, **{slot: own.get(slot, 0) + int(worth * more) for slot, more in gains.items()}}

    def _hints(
        self, engine: Engine, prompt: Prompt, fleet: Fleet, reaches: Mapping[int, Reach], queued_tokens: int
    ) -> Hints:
        """What an engine of ours is told with a prompt that is not counted as sent to it yet."""
        if not reaches and queued_tokens:
            reaches = self._knowledge.reaches(prompt, 1 << engine.slot)
        hints = choose_hints(engine.slot, reaches, fleet.peers, queued_tokens > 0)
        for kind, name in HINT_KINDS.items():
            if name in hints:
                self._metrics.hints.labels(kind).inc()
        return hints

    def _choose_for_session(
        self, fleet: Sequence[policy.Load], held: policy.Held, tokens: int, session: str, now: float
    ) -> policy.Decision:
        """Where the session lives, if that engine may take it; else where the rule says, and it lives there then."""
        assert self.state.sessions is not None
        number = number_of(session)
        home = self.state.sessions.slot(number, now)
        there = [load for load in fleet if load.slot == home]
        decision = self._choose(there or fleet, self._capped(there or fleet, held, tokens), tokens)
        self.state.sessions.placed(number, decision.slot, now)
        if there:
            decision.reason = "session"
        return decision

    def _warmed(self, loads: Sequence[policy.Load], now: float) -> Sequence[policy.Load]:
        """The engines without the new ones that have their share already."""
        warming, seconds = self._registry.warming, self.state.warm_up_seconds
        for slot in [slot for slot, since in warming.items() if now - since >= seconds]:
            del warming[slot]
        warm = [load.in_flight for load in loads if load.slot not in warming]
        if not warm:
            return loads
        mean = sum(warm) / len(warm)
        limits = {slot: policy.warm_up_limit(mean, now - since, seconds) for slot, since in warming.items()}
        return tuple(load for load in loads if load.in_flight < limits.get(load.slot, load.in_flight + 1))

    def _capped(self, fleet: Sequence[policy.Load], held: policy.Held, tokens: int) -> policy.Held:
        """What engines hold as the rule should see it: of what a decode engine lacks, others compute the most part."""
        least = tokens - self.state.prefill.min_tokens
        if least <= 0 or not self._registry.has_prefill:
            return held
        at = self._registry.at
        return {
            load.slot: max(held.get(load.slot, 0), least if at(load.slot).hands_over else 0) for load in fleet
        }  # fmt: skip

    def _choose(
        self, fleet: Sequence[policy.Load], held: policy.Held, tokens: int, last_slot: int | None = None
    ) -> policy.Decision:
        state = self.state
        mode = state.mode
        if mode == "kv":
            if state.overlap is not None:
                return policy.choose_overlap(fleet, held, tokens, state.overlap, self._rng)
            return policy.choose_kv(fleet, held, tokens, state.learner.model, self._rng, state.temperature)
        if mode == "round-robin":
            return policy.choose_round_robin(fleet, held, tokens, state.last_slot if last_slot is None else last_slot)
        if mode == "random":
            return policy.choose_random(fleet, held, tokens, self._rng)
        return policy.choose_least_loaded(fleet, held, tokens, self._rng)

    def check(self) -> None:
        assert self.state.mode in ("kv", "round-robin", "random", "least-loaded"), f"mode {self.state.mode}"
        self.state.learner.check()
        self.state.speeds.check()
        if self.state.sessions is not None:
            self.state.sessions.check()
