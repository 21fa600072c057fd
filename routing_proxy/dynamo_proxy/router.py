"""Places a request: gathers candidates and what they hold, asks the policy, charges the ledger. One
synchronous call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from . import policy
from .engines import Engine, EngineRegistry
from .knowledge import Knowledge
from .learning import CostLearner
from .ledger import Lease, Ledger
from .metrics import Metrics
from .text_chain import Prompt


class Placement(NamedTuple):
    """A charged decision. Whoever holds it releases the lease."""

    engine: Engine
    lease: Lease
    decision: policy.Decision
    queued_tokens: int  # prefill tokens ahead of it when it was placed
    prompt_tokens: int


@dataclass(slots=True)
class RoutingState:
    """What the rules remember between requests."""

    mode: str = "kv"
    learner: CostLearner = field(default_factory=CostLearner)
    overlap: policy.OverlapRule | None = None  # Dynamo's rule in the place of ours
    temperature: float = 0.0
    last_slot: int = -1


class Router:
    """The one place where an engine is picked and charged, and where leases end."""

    def __init__(
        self, registry: EngineRegistry, ledger: Ledger, knowledge: Knowledge, metrics: Metrics, rng: Random
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._knowledge = knowledge
        self._metrics = metrics
        self._rng = rng
        self.state = RoutingState()
        self._on_failure: Callable[[Engine, str], None] = lambda engine, reason: None

    def when_failed(self, call: Callable[[Engine, str], None]) -> None:
        """Name who hears that a request failed on an engine."""
        self._on_failure = call

    def place(self, prompt: Prompt, tried: int, now: float) -> Placement | None:
        """Pick an engine not yet in the bitmask `tried`, or None if there is none."""
        loads, mask = self._registry.fleet(prompt.model, tried)
        if not loads:
            return None
        tokens = self._knowledge.prompt_tokens(prompt)
        held = self._knowledge.matched_tokens(prompt, mask, now)
        decision = self._choose(loads, held, tokens)
        queued = self._ledger.loads[decision.slot].pending_tokens
        lease = self._ledger.charge(decision.slot, decision.new_tokens, tokens)
        self._knowledge.sent(decision.slot, prompt, now)
        self._metrics.decided(self.state.mode, decision.reason)
        if not tried:
            self.state.last_slot = decision.slot
            self._metrics.routed(tokens, decision.matched_tokens)
        engine = self._registry.at(decision.slot)
        if engine.breaker.score:
            engine.breaker.began()
        return Placement(engine, lease, decision, queued, tokens)

    def first_byte(self, placement: Placement, first_token_seconds: float) -> None:
        """The first body byte came: stop counting its prefill. Learn, if the time to a first token is known
        (above 0).
        """
        self._ledger.prefilled(placement.lease)
        if first_token_seconds:
            new = placement.decision.new_tokens
            self.state.learner.first_token(first_token_seconds, placement.queued_tokens, new, placement.prompt_tokens)

    def stream_ended(self, placement: Placement, events: int, seconds: float) -> None:
        """A stream came to its end: so many events, the last one `seconds` after the first."""
        load = self._ledger.loads[placement.engine.slot]
        self.state.learner.stream_ended(seconds, events, load.in_flight, load.active_tokens)

    def release(self, placement: Placement) -> None:
        """The request left its engine."""
        self._ledger.release(placement.lease)
        if placement.engine.breaker.score:
            placement.engine.breaker.left()

    def another(self, prompt: Prompt, tried: int) -> bool:
        """True if an untried engine could take this prompt."""
        return bool(self._registry.fleet(prompt.model, tried).loads)

    def max_model_tokens(self, model: str) -> int:
        """The context that every engine of this model has, in tokens; 0: not known."""
        known = [e.models.max_model_tokens for e in self._registry if e.models is not None and e.serves(model)]
        return min(known, default=0)

    def model_is_unknown(self, model: str) -> bool:
        """True if engines are ready, and none of any state serves this model."""
        return self._registry.any_ready() and not any(engine.serves(model) for engine in self._registry)

    def failed(self, engine: Engine, reason: str) -> None:
        """A request failed on an engine: health looks again, at once."""
        self._on_failure(engine, reason)

    def _choose(self, fleet: Sequence[policy.Load], held: policy.Held, tokens: int) -> policy.Decision:
        state = self.state
        mode = state.mode
        if mode == "kv":
            if state.overlap is not None:
                return policy.choose_overlap(fleet, held, tokens, state.overlap, self._rng)
            return policy.choose_kv(fleet, held, tokens, state.learner.model, self._rng, state.temperature)
        if mode == "round-robin":
            return policy.choose_round_robin(fleet, held, tokens, self.state.last_slot)
        if mode == "random":
            return policy.choose_random(fleet, held, tokens, self._rng)
        return policy.choose_least_loaded(fleet, held, tokens, self._rng)

    def check(self) -> None:
        assert self.state.mode in ("kv", "round-robin", "random", "least-loaded"), f"mode {self.state.mode}"
        self.state.learner.check()
