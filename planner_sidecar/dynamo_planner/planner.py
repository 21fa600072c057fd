"""One pool: observe, decide, act, record. All thinking is in `decision`; all doing is in the actuator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from .actuator import NOTHING_MORE, Actuator, Outcome
from .decision import decide
from .decision_log import Chain, DecisionLog
from .errors import ActuationError, ObservationError
from .history import History, sight
from .metrics import PlannerMetrics
from .observer import ObservationFailure, Observer
from .records import Decision, DecisionInputs, Memory, SizingPolicy

DEFAULT_POOL = "default"


@dataclass(frozen=True)
class Parts:
    """What the planner is made of. `clock` is monotonic, `wall` is seconds of the day's clock, `stamp` gives it as
    text, `say` is the console.
    """

    observer: Observer
    actuator: Actuator
    log: DecisionLog
    metrics: PlannerMetrics
    clock: Callable[[], float]
    wall: Callable[[], float]
    stamp: Callable[[], str]
    say: Callable[[str], None]


class Planner:
    """One pool's planner. `tick` and `order` never run at the same time: `lock` is held over both."""

    def __init__(self, policy: SizingPolicy, parts: Parts, pool: str = DEFAULT_POOL) -> None:
        self.policy = policy
        self.parts = parts
        self.pool = pool
        self.memory = Memory()
        self.history = History()
        self.last_tick_seconds: float | None = None
        self.lock = asyncio.Lock()
        self._chain = Chain()
        self._complaints: dict[str, str] = {}

    async def tick(self, order: int | None = None) -> tuple[Decision, Outcome]:
        """Observe, decide and act once. `order` is a replica count given by hand."""
        async with self.lock:
            return await self.finish(await self.look(order))

    async def look(self, order: int | None = None) -> DecisionInputs:
        """The first half of a tick: everything that the decision will depend on."""
        self.report_happenings()
        now, more = self.parts.clock(), NOTHING_MORE
        unknown: list[ObservationFailure] = []
        try:
            more = await self.parts.actuator.refresh()
        except ObservationError as error:
            unknown = [ObservationFailure("actuator", error.reason, str(error))]
        fleet, failures = await self.parts.observer.observe(now, self.parts.actuator.states())
        self._report_failures(unknown + failures)
        fleet = replace(
            fleet,
            is_complete=fleet.is_complete and not unknown,
            wall_seconds=self.parts.wall(),
            startups=more.startups,
            is_edited=more.is_edited,
            ordered=more.ordered,
        )
        return DecisionInputs(fleet, self.policy, self.memory, order)

    async def finish(self, inputs: DecisionInputs) -> tuple[Decision, Outcome]:
        """The second half: decide, act and record."""
        began = time.perf_counter()
        decision = decide(inputs)
        self.memory = decision.memory
        outcome = Outcome(True, "hold", ())
        if decision.direction != "hold":
            outcome = await self.parts.actuator.apply(decision.current, decision.desired, inputs.order is not None)
        self._record(decision, outcome)
        self.last_tick_seconds = inputs.observation.time_seconds
        self.parts.metrics.ticked(self.pool, time.perf_counter() - began)
        return decision, outcome

    def admit(self, replicas: int) -> None:
        """Raise ActuationError when a manual order is out of bounds or nothing may be changed."""
        low, high = self.policy.min_replicas, self.policy.max_replicas
        low = 0 if self.policy.idle_to_zero_seconds is not None else low
        if not low <= replicas <= high:
            raise ActuationError("out_of_bounds", f"{replicas} replicas are outside the bounds {low}..{high}")
        if self.parts.actuator.mode == "advisory":
            text = "this planner is advisory and changes nothing; start it with --no-advisory to let it scale"
            raise ActuationError("advisory", text)

    async def order(self, replicas: int) -> tuple[Decision, Outcome]:
        """A manual order. Raises ActuationError when it is out of bounds or nothing may be changed."""
        self.admit(replicas)
        return await self.tick(replicas)

    async def close(self) -> None:
        """Stop what was started and write the last lines."""
        try:
            await self.parts.actuator.close()
        finally:
            self.parts.actuator.kill_now()
            self.report_happenings()
            self.parts.log.close()

    def report_happenings(self) -> None:
        """Move what happened to replicas into the log, the metrics and the console."""
        for event in self.parts.actuator.happenings():
            self.parts.log.write("actuation", self.parts.stamp(), pool=self.pool, **asdict(event))
            for reason in filter(None, event.reason.split(",")):
                self.parts.metrics.actuation_failed(reason)
            word = f" ({event.reason})" if event.reason else ""
            self.parts.say(f"{event.what} {event.url}{word}: {event.text}")

    def survive(self, error: BaseException) -> None:
        """A tick that failed must not end the planner: that would stop replicas which serve well."""
        self.parts.metrics.observation_failed("tick_failed")
        self.parts.log.write("tick_failed", self.parts.stamp(), pool=self.pool, error=repr(error))
        self.parts.say(f"this tick failed and was skipped: {error!r}")

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self.parts.observer.check()
        self.parts.actuator.check()
        self.parts.log.check()
        self.history.check()
        self._chain.check()
        needs = self.memory.needs
        assert list(needs) == sorted(needs, key=lambda entry: entry[0]), "the window's entries are out of order"

    def _report_failures(self, failures: list[ObservationFailure]) -> None:
        """Count and log every failure; say it aloud only when it is new."""
        seen: dict[str, str] = {}
        for failure in failures:
            self.parts.metrics.observation_failed(failure.reason)
            self.parts.log.write("observation_failure", self.parts.stamp(), pool=self.pool, **asdict(failure))
            seen[failure.url] = failure.reason
            if self._complaints.get(failure.url) != failure.reason:
                self.parts.say(f"cannot read {failure.url} ({failure.reason}): {failure.text}")
        for url in self._complaints.keys() - seen.keys():
            self.parts.say(f"reads {url} again")
        self._complaints = seen

    def _record(self, decision: Decision, outcome: Outcome) -> None:
        mode = self.parts.actuator.mode
        plain, told = self._chain.entry(decision), asdict(outcome)
        self.parts.log.write("decision", self.parts.stamp(), pool=self.pool, mode=mode, outcome=told, decision=plain)
        seen = sight(decision, self.parts.wall())
        self.history.add(seen)
        self.parts.metrics.decided(self.pool, decision, outcome.accepted)
        self.parts.metrics.saw(self.pool, seen, decision)
        if mode != "advisory" and not outcome.accepted:
            self.parts.metrics.actuation_failed(outcome.reason)
        arrow = f"{decision.current} -> {decision.desired}"
        name = "" if self.pool == DEFAULT_POOL else f"{self.pool:8} "
        self.parts.say(f"{name}{arrow:8} {decision.reason:12} {decision.explanation}")
        for action in outcome.actions:
            self.parts.say(f"         {action}")
