"""The loop: observe, decide, act, record. All thinking is in `decision`; all doing is in the actuator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .actuator import Actuator, Outcome
from .decision import decide
from .decision_log import DecisionLog, encode
from .errors import ActuationError
from .metrics import PlannerMetrics
from .observer import ObservationFailure, Observer
from .records import Decision, DecisionInputs, Memory, SizingPolicy


@dataclass(frozen=True)
class Parts:
    """What the planner is made of. `clock` is monotonic, `stamp` gives the wall time as text, `say` is the
    console.
    """

    observer: Observer
    actuator: Actuator
    log: DecisionLog
    metrics: PlannerMetrics
    clock: Callable[[], float]
    stamp: Callable[[], str]
    say: Callable[[str], None]


class Planner:
    """One fleet's planner. `tick` and `order` never run at the same time."""

    def __init__(self, policy: SizingPolicy, parts: Parts) -> None:
        self.policy = policy
        self.parts = parts
        self.memory = Memory()
        self.last_tick_seconds: float | None = None
        self._lock = asyncio.Lock()
        self._complaints: dict[str, str] = {}

    async def run(self, interval_seconds: float, stop: asyncio.Event) -> None:
        """Tick until `stop` is set; a tick under way is then abandoned, never an actuation under way."""
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                ticking = asyncio.ensure_future(self.tick())
                await asyncio.wait({ticking, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not ticking.done():
                    ticking.cancel()
                    await asyncio.gather(ticking, return_exceptions=True)
                    return
                error = ticking.exception()
                if error is not None:
                    self._survive(error)
                await asyncio.wait({stopped}, timeout=interval_seconds)
        finally:
            stopped.cancel()

    async def tick(self, order: int | None = None) -> tuple[Decision, Outcome]:
        """Observe, decide and act once. `order` is a replica count given by hand."""
        async with self._lock:
            began = time.perf_counter()
            self.report_happenings()
            now = self.parts.clock()
            fleet, failures = await self.parts.observer.observe(now, self.parts.actuator.states())
            self._report_failures(failures)
            decision = decide(DecisionInputs(fleet, self.policy, self.memory, order))
            self.memory = decision.memory
            outcome = Outcome(True, "hold", ())
            if decision.direction != "hold":
                outcome = await self.parts.actuator.apply(decision.current, decision.desired, order is not None)
            self._record(decision, outcome)
            self.last_tick_seconds = now
            self.parts.metrics.ticked(time.perf_counter() - began)
            return decision, outcome

    async def order(self, replicas: int) -> tuple[Decision, Outcome]:
        """A manual order. Raises ActuationError when it is out of bounds or nothing may be changed."""
        low, high = self.policy.min_replicas, self.policy.max_replicas
        if not low <= replicas <= high:
            raise ActuationError("out_of_bounds", f"{replicas} replicas are outside the bounds {low}..{high}")
        if self.parts.actuator.mode == "advisory":
            text = "this planner is advisory and changes nothing; start it with --no-advisory to let it scale"
            raise ActuationError("advisory", text)
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
            self.parts.log.write("actuation", self.parts.stamp(), **asdict(event))
            for reason in filter(None, event.reason.split(",")):
                self.parts.metrics.actuation_failed(reason)
            word = f" ({event.reason})" if event.reason else ""
            self.parts.say(f"{event.what} {event.url}{word}: {event.text}")

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self.parts.observer.check()
        self.parts.actuator.check()
        self.parts.log.check()
        needs = self.memory.needs
        assert list(needs) == sorted(needs, key=lambda entry: entry[0]), "the window's entries are out of order"

    def _survive(self, error: BaseException) -> None:
        """A tick that failed must not end the planner: that would stop replicas which serve well."""
        self.parts.metrics.observation_failed("tick_failed")
        self.parts.log.write("tick_failed", self.parts.stamp(), error=repr(error))
        self.parts.say(f"this tick failed and was skipped: {error!r}")

    def _report_failures(self, failures: list[ObservationFailure]) -> None:
        """Count and log every failure; say it aloud only when it is new."""
        seen: dict[str, str] = {}
        for failure in failures:
            self.parts.metrics.observation_failed(failure.reason)
            self.parts.log.write("observation_failure", self.parts.stamp(), **asdict(failure))
            seen[failure.url] = failure.reason
            if self._complaints.get(failure.url) != failure.reason:
                self.parts.say(f"cannot read {failure.url} ({failure.reason}): {failure.text}")
        for url in self._complaints.keys() - seen.keys():
            self.parts.say(f"reads {url} again")
        self._complaints = seen

    def _record(self, decision: Decision, outcome: Outcome) -> None:
        plain: dict[str, Any] = encode(decision)
        mode = self.parts.actuator.mode
        self.parts.log.write("decision", self.parts.stamp(), mode=mode, outcome=asdict(outcome), decision=plain)
        self.parts.metrics.decided(decision, outcome.accepted)
        if mode != "advisory" and not outcome.accepted:
            self.parts.metrics.actuation_failed(outcome.reason)
        arrow = f"{decision.current} -> {decision.desired}"
        self.parts.say(f"{arrow:8} {decision.reason:12} {decision.explanation}")
        for action in outcome.actions:
            self.parts.say(f"         {action}")
