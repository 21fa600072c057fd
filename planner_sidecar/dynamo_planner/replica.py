"""One replica that the planner started or took over: performs the effects of its life table and reports what came of
them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .child_process import EngineProcess
from .drain import AFTER_EXIT, ENDED, SETTLED, SUPPLY, Effect, Event, Lifecycle, State, phase
from .errors import ObservationError
from .hand_offs import HandOffs
from .peers import Peers, ProxyAdmin
from .records import DRAINING, READY, STARTING


@dataclass(frozen=True)
class Limits:
    """Deadlines of the phases of a replica's life, and how often to look."""

    start_seconds: float = 600.0
    drain_seconds: float = 300.0
    terminate_seconds: float = 60.0
    register_seconds: float = 30.0
    resume_seconds: float = 30.0
    kill_seconds: float = 10.0
    forget_seconds: float = 5.0
    lease_seconds: float = 40.0  # of a hand-off; the connector gives 30 and renews them
    poll_seconds: float = 0.5


@dataclass(frozen=True)
class Surroundings:
    """What a replica needs to act: the peers, the time and the deadlines. Without a proxy `proxy` is None."""

    peers: Peers
    proxy: ProxyAdmin | None
    limits: Limits
    clock: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]

    def hand_offs(self) -> HandOffs:
        """Half of a drain at most goes to their wait: a number that stands still must not use up every drain."""
        limits = self.limits
        return HandOffs(self.peers, self.clock, min(limits.lease_seconds, limits.drain_seconds / 2))


class Replica:
    """An engine process, its life table and the deadline of the phase it is in."""

    def __init__(
        self,
        url: str,
        child: EngineProcess,
        around: Surroundings,
        gpus: tuple[str, ...] = (),
        state: State = State.STARTING,
    ) -> None:
        self.url = url
        self.child = child
        self.gpus = gpus
        self.life = Lifecycle(state)
        self.is_adopted = state is not State.STARTING
        self.born = around.clock()
        self.stopping = state is State.TERMINATING
        self.leave_by: float | None = None
        self._around = around
        self._phase_began = self.born
        self._idle_looks = 0
        self._hand_offs = around.hand_offs()

    @property
    def state(self) -> str:
        """As the planner counts it: starting, ready or draining."""
        if self.life.state in (State.STARTING, State.ADOPTING, State.REGISTERING):
            return STARTING
        return READY if self.life.state in SUPPLY else DRAINING

    @property
    def ended(self) -> bool:
        return self.life.state in ENDED

    def order_stop(self) -> bool:
        """Ask for a drained stop; False if it is already on its way out."""
        self.stopping = True
        if not self.life.can(Event.DRAIN_ORDERED):
            return False
        self._feed(Event.DRAIN_ORDERED)
        return True

    def order_keep(self) -> bool:
        """Take a stop back; False if it is too late for that."""
        if not self.life.can(Event.KEEP_ORDERED):
            return False
        self._feed(Event.KEEP_ORDERED)
        return True

    def note_exit(self) -> bool:
        """True if a replica that was ready has died; its life then goes on to the proxy's list."""
        if self.life.state is not State.READY or not self.child.gone():
            return False
        self._feed(Event.EXITED)
        return True

    async def drive(self) -> None:
        """Perform effects until the replica is ready or gone. May be cancelled and called again."""
        while self.life.state not in SETTLED:
            event = await self._next_event()
            if event is not None:
                self._feed(event)
            if event in (None, Event.FAILED, Event.BUSY):
                await self._around.sleep(self._around.limits.poll_seconds)

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self.life.check()
        self.child.check()
        if self.life.state is State.GONE:
            assert self.child.gone(), f"{self.url} is booked as gone but its process group runs"

    def _feed(self, event: Event) -> None:
        before = phase(self.life.state)
        self.life.feed(event)
        if phase(self.life.state) != before:
            self._phase_began, self._idle_looks = self._around.clock(), 0
            self._hand_offs = self._around.hand_offs()

    async def _next_event(self) -> Event | None:
        if self.life.state not in AFTER_EXIT and self.child.gone():
            return Event.EXITED
        if self._around.clock() >= self._deadline():
            final = self.leave_by is not None or self._around.proxy is None
            return Event.LAST_DEADLINE if final else Event.DEADLINE
        return await self._perform(self.life.effect)

    def _deadline(self) -> float:
        limits, state = self._around.limits, self.life.state
        seconds = {
            "starting": limits.start_seconds,
            "adopting": limits.start_seconds,
            "registering": limits.register_seconds,
            "abandoning": limits.register_seconds,
            "drain": limits.drain_seconds,
            "resuming": limits.resume_seconds,
            "terminating": limits.terminate_seconds,
            "killing": limits.kill_seconds,
            "forgetting": limits.forget_seconds,
        }[phase(state)]
        until = self._phase_began + seconds
        if self.leave_by is None or state in (State.TERMINATING, State.KILLING, State.FORGETTING):
            return until
        return min(until, self.leave_by)

    async def _perform(self, effect: Effect) -> Event | None:
        """Do it, or look once; None means not yet."""
        if effect is Effect.AWAIT_HEALTH:
            return Event.HEALTHY if await self._around.peers.healthy(self.url) else None
        if effect is Effect.AWAIT_IDLE:
            return await self._look_idle()
        if effect is Effect.TERMINATE:
            self.child.terminate()
            return None
        if effect is Effect.KILL:
            self.child.kill()
            return None
        return await self._ask_proxy(effect)

    async def _ask_proxy(self, effect: Effect) -> Event:
        proxy = self._around.proxy
        if proxy is None:
            return Event.ACCEPTED if effect in (Effect.REGISTER, Effect.RESUME) else Event.UNKNOWN
        call = {
            Effect.REGISTER: proxy.register,
            Effect.ASK_DRAIN: proxy.drain,
            Effect.RESUME: proxy.resume,
            Effect.REMOVE: proxy.remove,
        }[effect]
        try:
            status = await call(self.url)
        except ObservationError:
            return Event.FAILED
        if effect is Effect.REGISTER:
            return Event.ACCEPTED if 200 <= status < 300 else Event.FAILED
        if effect is Effect.REMOVE and status == 409:
            return Event.BUSY
        return Event.ACCEPTED if 200 <= status < 300 else Event.UNKNOWN if status == 404 else Event.FAILED

    async def _look_idle(self) -> Event | None:
        """The proxy's count rules; without one the engine's own gauges must be zero twice, since they lag
        a step.
        """
        try:
            if self._around.proxy is not None:
                listed = (await self._around.proxy.engines()).find(self.url)
                if listed is not None:
                    is_idle = listed.in_flight == 0 and await self._hand_offs.are_over(self.url)
                    return Event.IDLE if is_idle else None
            reading = await self._around.peers.scrape(self.url)
        except ObservationError:
            self._idle_looks = 0
            return None
        is_idle = reading.running + reading.waiting == 0 and self._hand_offs.are_over_in(self.url, reading)
        self._idle_looks = self._idle_looks + 1 if is_idle else 0
        return Event.IDLE if self._idle_looks >= 2 else None
