"""Starts and stops engine replicas as processes of this machine; only replicas that it, or the planner before it,
started are ever stopped.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .actuator import Happening, Outcome, Supplement
from .child_process import AdoptedProcess, ChildProcess
from .drain import ENDED, State, choose_victim
from .errors import ActuationError, ObservationError
from .records import DRAINING, STARTING
from .replica import Replica, Surroundings
from .replica_record import birth_of, records
from .rolling import RollingRestart

_FIRST_BACKOFF_SECONDS = 15.0
_MAX_BACKOFF_SECONDS = 300.0


@dataclass(frozen=True)
class LaunchPlan:
    """How to start one replica: a command with `{port}`, the inclusive port range, where its output goes, the GPUs that
    there are for all of them (none named: replicas see what the planner sees), and whose they are.
    """

    command: str
    ports: tuple[int, int]
    log_dir: Path
    host: str = "127.0.0.1"
    keep_on_exit: bool = False
    exit_seconds: float = 30.0
    gpus: tuple[str, ...] = ()
    gpus_per_replica: int = 1
    fleet: str = ""


class LocalProcessActuator:
    """One task per replica that is on its way in or out; ready replicas need none."""

    mode = "actuate"

    def __init__(self, plan: LaunchPlan, around: Surroundings) -> None:
        self._plan = plan
        self._around = around
        self._replicas: dict[str, Replica] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._happenings: list[Happening] = []
        self._startups: list[float] = []
        self._has_adopted = False
        self._failed_starts = 0
        self._not_before = 0.0
        self._closing = False
        self._rolling = RollingRestart()

    def states(self) -> Mapping[str, str]:
        return {url: replica.state for url, replica in self._replicas.items() if not replica.ended}

    async def refresh(self) -> Supplement:
        if not self._has_adopted:
            self._has_adopted = True
            self._adopt()
        self.notice()
        await self._register_again()
        startups, self._startups = tuple(self._startups), []
        return Supplement(startups, ordered=sum(not replica.ended for replica in self._replicas.values()))

    async def apply(self, current: int, desired: int, by_hand: bool) -> Outcome:
        """Start or drain as many as asked. An order by hand does not wait for the back-off."""
        if self._closing:
            return Outcome(False, "stopping", ("the planner is stopping; nothing is started or drained any more",))
        if self._rolling.is_running:
            return Outcome(False, "restarting", ("a rolling restart is under way; order again when it has ended",))
        self.notice()
        if desired > current:
            kept = self._keep_some(desired - current)
            if len(kept) == desired - current:
                return Outcome(True, "kept", kept)
            started = self._start_some(desired - current - len(kept), by_hand)
            return Outcome(started.accepted or bool(kept), started.reason, kept + started.actions)
        return await self._stop_some(current - desired)

    async def restart(self) -> Outcome:
        """Each one is started anew before the old one is drained away: one more runs meanwhile."""
        if self._closing or self._rolling.is_running:
            return Outcome(False, "restarting", ("a rolling restart is under way already",))
        self.notice()
        urls = [url for url, replica in self._replicas.items() if replica.life.state is State.READY]
        if not urls:
            return Outcome(False, "no_victim", ("no replica that this planner started is ready",))
        self._rolling.begin(urls, self._replace_one)
        return Outcome(True, "restarting", (f"replacing {len(urls)} replica(s), one at a time",))

    def happenings(self) -> list[Happening]:
        self.notice()
        self._happenings += self._rolling.take()
        taken, self._happenings = self._happenings, []
        return taken

    def notice(self) -> None:
        """Book what ended since the last look: finished tasks and ready replicas that died."""
        for url, replica in list(self._replicas.items()):
            task = self._tasks.get(url)
            if task is not None and task.done():
                del self._tasks[url]
                self._book(replica, task)
            elif task is None and replica.note_exit():
                self._drive(replica)

    async def close(self) -> None:
        """Drain and stop all replicas at once; none is left when this returns, unless they are to be kept."""
        self._closing = True  # an order that is still under way must start nothing now
        await self._rolling.end()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        try:
            if not self._plan.keep_on_exit:
                await self._stop_all()
        finally:
            for replica in self._replicas.values():
                replica.child.release()

    async def _stop_all(self) -> None:
        leave_by = self._around.clock() + self._plan.exit_seconds
        remaining = [replica for replica in self._replicas.values() if not replica.ended]
        for replica in remaining:
            replica.leave_by = leave_by
            replica.note_exit()
            replica.order_stop()
        ends = await asyncio.gather(*(replica.drive() for replica in remaining), return_exceptions=True)
        for replica, end in zip(remaining, ends, strict=True):
            well = end is None and replica.life.state is State.GONE
            self._tell(replica, "stopped" if well else "failed", repr(end) if end else replica.child.exit_text)
        self.kill_now()

    def kill_now(self) -> None:
        self._closing = True
        if self._plan.keep_on_exit:
            return
        for replica in self._replicas.values():
            if not replica.child.gone():
                replica.child.kill()

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert set(self._tasks) <= set(self._replicas), "a task without its replica"
        for url, replica in self._replicas.items():
            assert replica.url == url, f"{replica.url} is booked under {url}"
            replica.check()

    def _start_some(self, count: int, by_hand: bool) -> Outcome:
        wait = self._not_before - self._around.clock()
        if wait > 0 and not by_hand:
            text = f"not starting for another {wait:.0f} s: {self._failed_starts} start(s) in a row failed"
            return Outcome(False, "backing_off", (text,))
        actions = []
        try:
            for _ in range(count):
                actions.append(self._start_one())
        except ActuationError as error:
            self._count_failed_start()
            self._happenings.append(Happening("", "failed", error.reason, str(error)))
            return Outcome(bool(actions), error.reason, (*actions, str(error)))
        return Outcome(True, "started", tuple(actions))

    async def _replace_one(self, url: str) -> str:
        try:
            fresh = self._replicas[self._launch()]
        except ActuationError as error:
            return error.reason
        while fresh.state == STARTING and not fresh.ended:
            await self._around.sleep(self._around.limits.poll_seconds)
        if fresh.life.state is not State.READY:
            return "start_failed"
        old = self._replicas.get(url)
        if old is None or not old.order_stop():
            return ""  # it has gone by itself
        self._drive_anew(old)
        while not old.ended and old.stopping:
            await self._around.sleep(self._around.limits.poll_seconds)
            self.notice()
        return "" if old.ended else "drain_undone"

    def _start_one(self) -> str:
        replica = self._replicas[self._launch()]
        on = f", GPU {','.join(replica.gpus)}" if replica.gpus else ""
        return f"starting {replica.url} (process {replica.child.pid}{on}, output in {replica.child.log_path})"

    def _launch(self) -> str:
        """Start one more and return its URL. Raises ActuationError."""
        used = {int(url.rpartition(":")[2]) for url, replica in self._replicas.items() if not replica.ended}
        port, gpus = free_port(self._plan.ports, used), self._free_gpus()
        child = ChildProcess(self._plan.command, port, self._log_path(port), gpus, self._plan.fleet)
        return self._take_in(Replica(self._url(port), child, self._around, gpus)).url

    def _adopt(self) -> None:
        """Go on with what a planner that is gone has left running."""
        for record in records(self._plan.log_dir, self._plan.ports):
            life = record.life
            if life.fleet != self._plan.fleet:
                if birth_of(life.pid) != life.birth:
                    record.remove()
                    continue
                record.release()
                text = f"process {life.pid} is of another fleet ({life.fleet}); stop it if nobody needs it"
                self._happenings.append(Happening(self._url(life.port), "left", "other_fleet", text))
                continue
            child = AdoptedProcess(record, self._log_path(life.port))
            state = State.TERMINATING if life.is_terminated else State.ADOPTING
            replica = self._take_in(Replica(self._url(life.port), child, self._around, life.gpus, state))
            renew = "" if life.command == self._plan.command else "; its command is another: POST /restart renews it"
            text = f"process {child.pid} of an earlier planner{renew}"
            self._happenings.append(Happening(replica.url, "adopted", "", text))

    async def _register_again(self) -> None:
        """A proxy that was started anew knows none of the replicas."""
        proxy = self._around.proxy
        if proxy is None:
            return
        try:
            listed = {engine.url for engine in (await proxy.engines()).engines}
            ready = [url for url, replica in self._replicas.items() if replica.life.state is State.READY]
            for url in ready:
                if url not in listed and url not in self._tasks and 200 <= await proxy.register(url) < 300:
                    text = "the proxy did not list it any more"
                    self._happenings.append(Happening(url, "registered", "again", text))
        except ObservationError:
            return  # the next look may find it

    def _take_in(self, replica: Replica) -> Replica:
        self._replicas[replica.url] = replica
        self._drive(replica)
        return replica

    def _url(self, port: int) -> str:
        return f"http://{self._plan.host}:{port}"

    def _log_path(self, port: int) -> Path:
        return self._plan.log_dir / f"engine-{port}.log"

    def _free_gpus(self) -> tuple[str, ...]:
        """GPUs for one more. One that could not be killed may still hold its own. Raises ActuationError."""
        if not self._plan.gpus:
            return ()
        held = {gpu for replica in self._replicas.values() for gpu in replica.gpus}
        free = [gpu for gpu in self._plan.gpus if gpu not in held]
        count = self._plan.gpus_per_replica
        if len(free) < count:
            text = f"{len(free)} of {len(self._plan.gpus)} GPUs are free and a replica needs {count}"
            raise ActuationError("no_free_gpu", f"{text}; wait for a drain, or name more in --engine-gpus")
        return tuple(free[:count])

    async def _stop_some(self, count: int) -> Outcome:
        in_flight = await self._in_flight()
        if self._closing:
            return Outcome(False, "stopping", ())
        actions = []
        for _ in range(count):
            now = self._around.clock()
            url = choose_victim(
                (url, in_flight.get(url, 0), now - replica.born)
                for url, replica in self._replicas.items()
                if not replica.ended and replica.state != DRAINING and not replica.stopping
            )
            if url is None:
                break
            actions.append(self._stop_one(self._replicas[url], in_flight.get(url)))
        if not actions:
            return Outcome(False, "no_victim", ("none of the replicas was started by this planner",))
        return Outcome(True, "draining", tuple(actions))

    def _keep_some(self, count: int) -> tuple[str, ...]:
        """Take back up to `count` drains: a replica that still serves needs no start, and no second GPU."""
        actions: list[str] = []
        for replica in self._replicas.values():
            if len(actions) < count and replica.order_keep():
                self._drive_anew(replica)
                actions.append(f"keeping {replica.url}: its drain is taken back")
        return tuple(actions)

    def _drive_anew(self, replica: Replica) -> None:
        running = self._tasks.pop(replica.url, None)
        if running is not None:
            running.cancel()
        self._drive(replica)

    def _stop_one(self, replica: Replica, in_flight: int | None) -> str:
        replica.order_stop()
        self._drive_anew(replica)
        known = "" if in_flight is None else f" with {in_flight} requests in flight"
        return f"draining {replica.url}{known}, then stopping it"

    async def _in_flight(self) -> dict[str, int]:
        """Requests in flight per replica: the proxy's count, else the engine's gauges; unreadable ones
        come last.
        """
        if self._around.proxy is not None:
            try:
                listing = await self._around.proxy.engines()
            except ObservationError:
                return {}
            return {engine.url: engine.in_flight for engine in listing.engines}
        counts = {}
        for url in [url for url, replica in self._replicas.items() if replica.life.state is State.READY]:
            try:
                reading = await self._around.peers.scrape(url)
            except ObservationError:
                continue
            counts[url] = int(reading.running + reading.waiting)
        return counts

    def _drive(self, replica: Replica) -> None:
        self._tasks[replica.url] = asyncio.get_running_loop().create_task(replica.drive())

    def _book(self, replica: Replica, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        state = replica.life.state
        if error is not None:
            replica.child.kill()
            self._tell(replica, "failed", f"{error!r}; its process group was killed")
        elif state in ENDED:
            stopped = replica.stopping and state is State.GONE
            if not stopped and not replica.is_adopted:
                self._count_failed_start()
            self._tell(replica, "stopped" if stopped else "failed", replica.child.exit_text)
        elif replica.stopping:
            replica.stopping = False
            self._tell(replica, "kept", "the stop was undone and the replica serves on")
        else:
            self._failed_starts, self._not_before = 0, 0.0
            seconds = self._around.clock() - replica.born
            if not replica.is_adopted:
                self._startups.append(seconds)
            self._tell(replica, "ready", f"healthy and registered after {seconds:.1f} s")
        if error is not None or state is State.GONE:
            self._replicas.pop(replica.url, None)
            replica.child.release()

    def _tell(self, replica: Replica, what: str, text: str) -> None:
        reasons, replica.life.reasons = replica.life.reasons, []
        note = f"{text}; output in {replica.child.log_path}" if what == "failed" else text
        self._happenings.append(Happening(replica.url, what, ",".join(reasons), note))

    def _count_failed_start(self) -> None:
        pause = min(_MAX_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0**self._failed_starts)
        self._failed_starts += 1
        self._not_before = self._around.clock() + pause


def free_port(ports: tuple[int, int], used: Iterable[int]) -> int:
    """A port of the inclusive range that nobody listens on. Raises ActuationError when there is none."""
    taken = set(used)
    for port in itertools.takewhile(lambda number: number <= ports[1], itertools.count(ports[0])):
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    text = f"no free port in {ports[0]}-{ports[1]}; widen --engine-port-range"
    raise ActuationError("no_free_port", text)
