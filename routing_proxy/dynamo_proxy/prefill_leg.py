"""The prefill half of a disaggregated request: its prompt at a prefill engine, watched until it answers or is late.

With vLLM, whatever goes wrong here costs the client time and nothing else: the decode engine computes the prompt
itself. With SGLang both halves run at once, in a room; without one the other has to begin anew, in another room.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from typing import Any, Protocol

from . import handoff
from .http1 import Request, ResponseReader
from .http_heads import ResponseHead
from .last_resort import Endable, guarded
from .router import Placement
from .services import Services
from .text_chain import Prompt
from .upstream import ResponseSink, UpstreamConnection
from .wire import request_bytes, whole_response_bytes

#: Which engine computed a prompt for another one, and how that ended, or why none did.
Prefilled = tuple[str, str]
NOT_PREFILLED: Prefilled = ("", "")
_MAX_ANSWER_BYTES = 16 << 20
_ROOM_BITS = 62
_MAY_PASS = frozenset((408, 429))  # refusals for the moment: another engine may take the request


class Whole(Endable, Protocol):
    """The request of which a leg is a part."""

    def leg_over(self, ticket: dict[str, Any] | None) -> None: ...


def begin_leg(
    services: Services, request: Request, prompt: Prompt, placement: Placement, whole: Whole
) -> tuple[PrefillLeg | None, Prefilled]:
    """Have the prompt of a request computed for the engine of `placement` if that pays, or say why not; `whole` hears
    the end of it.
    """
    engine = placement.engine
    if engine.needs_room(request.head.path):
        return _begin_in_room(services, request, prompt, placement, whole)
    if engine.kind != "vllm" or request.head.method != b"POST":
        return None, ("", "not_divisible")
    now = asyncio.get_running_loop().time()
    chosen = services.router.place_prefill(prompt, placement, now)
    if isinstance(chosen, str):
        services.metrics.prefill_legs.labels(chosen).inc()
        return None, ("", chosen)
    half = handoff.prefill_body(request.head.path, request.body)
    if half is None:
        services.router.release(chosen)
        services.router.prefill_came_back(placement)
        services.metrics.prefill_legs.labels("not_divisible").inc()
        return None, ("", "not_divisible")
    if chosen.hints:
        half = handoff.with_params(half, chosen.hints)
    leg = PrefillLeg(services, request, half, chosen, whole)
    leg.start()
    return leg, NOT_PREFILLED


def _begin_in_room(
    services: Services, request: Request, prompt: Prompt, placement: Placement, whole: Whole
) -> tuple[PrefillLeg | None, Prefilled]:
    now = asyncio.get_running_loop().time()
    chosen = services.router.place_prefill(prompt, placement, now, in_room=True)
    if isinstance(chosen, str):
        services.metrics.prefill_legs.labels(chosen).inc()
        return None, ("", chosen)
    engine, path = chosen.engine, request.head.path
    room, half = handoff.in_a_room(path, request.body, engine.address.host, engine.bootstrap_port, _draw_room)
    leg = PrefillLeg(services, request, half, chosen, whole)
    leg.room = room
    leg.start()
    return leg, NOT_PREFILLED


def _draw_room() -> int:
    """A room is one request's for ever: it must not come twice, whichever proxy draws it."""
    return secrets.randbits(_ROOM_BITS) + 1


class PrefillLeg(ResponseSink):
    """One prompt at one prefill engine. Exactly one call of `leg_over` ends it, unless it is cancelled before."""

    __slots__ = (
        "_answer", "_answered", "_began", "_dial", "_half", "_head", "_loop", "_request", "_reused",
        "_services", "_timer", "_up", "_whole", "over", "placement", "reason", "refusal", "room",
    )  # fmt: skip

    def __init__(self, services: Services, request: Request, half: bytes, placement: Placement, whole: Whole) -> None:
        self._services = services
        self._request = request
        self._half = half
        self.placement = placement
        self._whole = whole
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._up: UpstreamConnection | None = None
        self._dial: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reused = False
        self._head: ResponseHead | None = None
        self._answer: list[bytes] = []
        self._answered = 0
        self.over = False
        self.reason = ""  # how it ended
        self.room: dict[str, Any] = {}  # what the other half is told, which runs beside this one; empty: it waits
        self.refusal: ResponseHead | None = None  # in a room: of the answer to a bad request

    @property
    def engine_name(self) -> str:
        return self.placement.engine.name

    def answer_bytes(self, receipt: bytes) -> bytes:
        """The refusal as the client gets it."""
        assert self.refusal is not None
        body = b"".join(self._answer)
        return whole_response_bytes(self.refusal, self._request.head, self.placement, body, receipt)

    def start(self) -> None:
        if not self.room:  # there it answers when decode took its KV: the other half's deadline counts for both
            self._timer = self._loop.call_later(self._services.prefill_seconds, guarded, self, self._late)
        connection = self.placement.engine.pool.take(self._began)
        self._reused = connection is not None
        if connection is not None:
            self._send(connection)
        else:
            self._dial = self.placement.engine.pool.dial(self)

    def cancel(self, fault: str = "") -> None:
        """Nobody wants it any more: the prefill engine must stop. `fault`: what it is to blame for, if it is."""
        if not self.over:
            self._services.metrics.prefill_legs.labels(fault or "cancelled").inc()
            self._leave()
            if fault:
                self._services.router.failed(self.placement.engine, fault)

    def on_dialled(self, connection: UpstreamConnection | None, reason: str) -> None:
        self._dial = None
        if self.over:
            if connection is not None:
                connection.abandon()
        elif connection is None or not connection.is_open:
            self._fail(reason or "connection_lost")
        else:
            self._send(connection)

    def _send(self, connection: UpstreamConnection) -> None:
        head = self._request.head
        self._up = connection
        reader = ResponseReader(head.method, self._services.limits.max_head_bytes, decode=True)
        connection.begin(self, reader, request_bytes(head, head.target, self._half, self.placement.engine.host_lines))

    def _late(self) -> None:
        self._timer = None
        self._fail("timeout")

    def seconds_left(self) -> float:
        return math.inf  # its own timer counts from before it had a connection

    def on_late(self) -> None:
        raise AssertionError("a leg is never late for its connection")

    # --- from the engine (ResponseSink)

    def on_head(self, head: ResponseHead) -> None:
        self._head = head

    def on_body(self, data: bytes) -> None:
        self._answer.append(data)
        self._answered += len(data)
        if self._answered > _MAX_ANSWER_BYTES:
            self._fail("bad_answer")

    def on_end(self) -> None:
        self._up = None
        head = self._head
        assert head is not None
        if head.status != 200:
            if self.room and 400 <= head.status < 500 and head.status not in _MAY_PASS:
                self.refusal = head
            self._fail(f"status_{head.status}")
            return
        ticket = handoff.ticket(b"".join(self._answer)) if not self.room else self.room
        seconds = self._loop.time() - self._began if not self.room else 0.0  # in a room it waited for decode, too
        self._services.router.first_byte(self.placement, seconds)
        if seconds:
            self._services.metrics.prefilled(self.engine_name, seconds)
        if self.placement.engine.breaker.score:
            self.placement.engine.breaker.passed()
        self._end("handed_over" if ticket is not None else "no_ticket", ticket)

    def on_lost(self, reason: str) -> None:
        if self._reused and reason == "connection_lost" and self._head is None:
            # It closed an idle connection just as we used it: not its fault.
            self._services.metrics.retries.labels("stale_connection").inc()
            self._up, self._reused = None, False
            self._dial = self.placement.engine.pool.dial(self)
        else:
            self._fail(reason)

    def on_fault(self) -> None:
        self._whole.on_fault()

    # --- endings

    def _fail(self, reason: str) -> None:
        self._count(reason)
        self._leave()
        if not reason.startswith("status_4"):
            self._services.router.failed(self.placement.engine, reason)
        self._whole.leg_over(None)  # who asks again at once finds this engine marked

    def _end(self, reason: str, ticket: dict[str, Any] | None) -> None:
        self._count(reason)
        self._leave()
        self._whole.leg_over(ticket)

    def _count(self, reason: str) -> None:
        self.reason = reason
        self._services.metrics.prefill_legs.labels(reason).inc()

    def _leave(self) -> None:
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        up, self._up = self._up, None
        if up is not None:
            up.abandon()
        self._services.router.release(self.placement)

    def check(self) -> None:
        assert not self.over or (self._up is None and self._timer is None), "a finished leg still holds its engine"
