"""Between two real engines: what may happen to each message, and to an engine at that moment."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.handoff_columns import awake
from dynamo_connectors.transport.messages import (
    STANDING_LEASE,
    Ask,
    Done,
    Grant,
    Hello,
    Reply,
    Request,
    Welcome,
)
from tests.transport.peers import Between
from tests.vllm.handoff_tickets import SECRET
from tests.vllm.pair import Pair
from tools.server_process import ServerProcess, first_error, free_port

SIDES = ("prefill", "decode")
KINDS: dict[str, type] = {kind.__name__: kind for kind in (Hello, Welcome, Ask, Grant, Done)}


@dataclass
class Plan:
    """What happens to the messages of one lease, or of one READ."""

    kind: type | None = None
    #: Told once, at the first message of `kind`.
    act: Callable[[], object] | None = None
    times: Callable[[], int] = lambda: 1
    delay: Callable[[], float] = lambda: 0.0
    #: Whether such a message has come by.
    is_met: bool = False

    def meets(self, message: Request | Reply) -> bool:
        return self.kind is None or isinstance(message, self.kind)


class Middle(Between):
    """Plans by lease; READs of blocks that nobody leased get one of their own, each, from `chance`."""

    def __init__(self, owner_port: int, chance: random.Random) -> None:
        self.port = free_port()
        self.plans: dict[bytes, Plan] = {}
        self.breaks_in: deque[Plan] = deque()
        self._chance = chance
        self._reads: dict[tuple[bytes, int], bytes] = {}
        super().__init__(self.port, owner_port, SECRET)
        self.hook, self.delay = self._times_of, self._delay_of

    def _times_of(self, message: Request | Reply) -> int:
        for plan in [each for each in self.breaks_in if each.meets(message)]:
            self.breaks_in.remove(plan)
            assert plan.act is not None
            plan.act()
        plan_of = self._plan(message)
        if plan_of is None or not plan_of.meets(message):
            return 1
        is_first, plan_of.is_met = not plan_of.is_met, True
        if plan_of.act is not None and is_first:
            plan_of.act()
        return plan_of.times()

    def _delay_of(self, message: Request | Reply) -> float:
        plan = self._plan(message)
        return plan.delay() if plan is not None and plan.meets(message) else 0.0

    def _plan(self, message: Request | Reply) -> Plan | None:
        read = (getattr(message, "reader", b""), getattr(message, "read", -1))
        if isinstance(message, Ask) and read not in self._reads:
            self._reads[read] = message.lease
            if message.lease == STANDING_LEASE:
                self._reads[read] = lease = os.urandom(16)
                self.plans[lease] = self._at_random()
        lease = self._reads.get(read) or getattr(message, "lease", b"")
        return self.plans.get(lease)

    def _at_random(self) -> Plan:
        chance = self._chance
        if chance.random() < 0.5:
            return Plan(times=lambda: chance.choice((0, 1, 1, 2)))
        return Plan(chance.choice((Ask, Grant)), delay=lambda: chance.uniform(0.3, 1.8))


def last_words(log: Path) -> str:
    """What UCX or the system said of a crash, or else the first error."""
    said = re.findall(r".*(?:Assertion|Caught signal|Fatal).*", log.read_text(errors="replace"))
    return said[0].strip() if said else first_error(log)


@dataclass
class Engines:
    """Both, as they are stopped, killed and started again meanwhile."""

    pair: Pair
    notes: list[str] = field(default_factory=list)
    ready: dict[str, threading.Event] = field(default_factory=lambda: {side: threading.Event() for side in SIDES})
    #: Times that the decode engine was killed.
    lives: int = 0
    _busy: threading.Lock = field(default_factory=threading.Lock)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _under_way: list[Future[None]] = field(default_factory=list)

    def server(self, side: str) -> ServerProcess:
        return self.pair.prefill_server if side == "prefill" else self.pair.decode_server

    def stop_for(self, side: str, seconds: float) -> None:
        """From the hook. One engine at a time."""
        if self._busy.acquire(blocking=False):
            self.server(side).stand_still()
            self._under_way.append(self._pool.submit(self._go_on, side, seconds))

    def kill(self, side: str, why: str) -> None:
        self._busy.acquire()
        self._kill(side, f"killed at {why}")

    def revive(self, side: str) -> None:
        """Starts it again if it has died by itself."""
        if self._busy.acquire(blocking=False):
            server = self.server(side)
            if server.process is None or server.process.poll() is None:
                self._busy.release()
            else:
                self._kill(side, f"died by itself: {last_words(server.log)}")

    def _kill(self, side: str, why: str) -> None:
        self.ready[side].clear()
        self.lives += side == "decode"
        self.server(side).kill()
        self._under_way.append(self._pool.submit(self._start_again, side, why))

    def settle(self) -> None:
        for each in self._under_way:
            each.result()

    def close(self) -> None:
        """When the engines have ended: one that was started again does not outlive the thread that did it."""
        self._pool.shutdown()

    def _go_on(self, side: str, seconds: float) -> None:
        time.sleep(seconds)
        self.server(side).go_on()
        self._busy.release()

    def _start_again(self, side: str, why: str) -> None:
        started = time.monotonic()
        try:
            awake(self.server(side).start())
            self.notes.append(f"{side} {why}, back after {time.monotonic() - started:.0f} s")
        finally:  # clients that wait for it hear of a failed start
            self.ready[side].set()
            self._busy.release()
