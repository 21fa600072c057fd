"""One request on its way: placed, sent, retried while nothing was relayed, then relayed byte by byte.

States: waiting (no body byte relayed: every failure moves on to the next engine) -> relaying (the answer has begun) ->
over. The response head is held back until the first body byte: engines send "200 OK" before they prefill, and one that
dies meanwhile costs the client nothing. A failure while relaying ends the answer, unless the stream is on tape: then
relaying -> resuming (as waiting, for the rest; where it takes that, an engine is asked for its ids) -> relaying.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from .account import Account
from .client_connection import ClientConnection
from .guard import Meter
from .http_heads import ResponseHead
from .intake import Asked
from .last_resort import CODE, MESSAGE, guarded
from .outgoing import Outgoing
from .prefill_leg import NOT_PREFILLED, PrefillLeg, begin_leg
from .router import Placement
from .services import Services
from .stream_tape import Frames, PlainFrames
from .upstream import ResponseSink, UpstreamConnection
from .wire import is_framed, may_speak, refusal, response_bytes, stream_error_bytes

_STALE_RETRIES = 3


class Exchange(ResponseSink):
    """Carries one request to an engine and its answer back. It owns at most one placement at any time."""

    __slots__ = (
        "_account", "_attempt_started", "_client", "_dial", "_endpoint", "_events", "_failure", "_first_token",
        "_frames", "_head", "_heard", "_last", "_leg", "_loop", "_meter", "_out", "_placement", "_prefilled",
        "_prompt", "_relaying", "_request", "_reused", "_services", "_stale", "_tried", "_up", "over",
    )  # fmt: skip

    def __init__(
        self, client: ClientConnection, asked: Asked, endpoint: str, services: Services, meter: Meter | None = None
    ) -> None:
        self._client, self._services, self._endpoint = client, services, endpoint
        self._request, self._prompt = asked.request, asked.prompt
        self._loop = client.loop
        self._account = Account(asked, endpoint, services, meter, self._loop.time())
        self._tried, self._failure = 0, ""
        self._relaying = self.over = False
        self._meter, self._out = meter, Outgoing(asked, endpoint)
        # per attempt
        self._attempt_started = self._heard = self._first_token = 0.0
        self._placement: Placement | None = None
        self._leg: PrefillLeg | None = None  # another engine computes the prompt meanwhile
        self._prefilled, self._events = NOT_PREFILLED, 0  # events of a stream since its first
        self._up: UpstreamConnection | None = None
        self._dial: asyncio.Task[Any] | None = None
        self._head: ResponseHead | None = None
        self._frames: Frames | None = None  # None: the engine's bytes pass as they are
        self._reused, self._stale, self._last = False, 0, b""

    def start(self) -> None:
        self._services.metrics.tallies.arrived(len(self._request.body))
        guarded(self, self._attempt)

    def abort(self, status: int, reason: str) -> None:
        """The client is gone, or shall be: the engine must stop working for it."""
        if not self.over:
            self._leave_engine()
            self._close(status, reason, self._client.cut)

    # --- towards the engine

    def _attempt(self) -> None:
        now = self._loop.time()
        placement = self._services.router.place(self._prompt, self._tried, now)
        if placement is None:
            self._give_up()
            return
        self._placement = placement
        self._tried |= 1 << placement.engine.slot
        self._attempt_started = now
        self._stale, self._prefilled = 0, NOT_PREFILLED
        if self._out.lacks_rest(placement.engine):
            self._dial = self._out.seek_rest(placement.engine, self._services.tokens, self)
        else:
            self._begin(placement, now)

    def on_rest(self, reason: str) -> None:
        """An engine told what the request for the rest of a stream hangs on, or why not."""
        self._dial, placement = None, self._placement
        assert placement is not None
        if reason:
            self._tried = -1 if reason == "not_exact" else self._tried  # nor could others be sure of it
            self._next_engine(reason, is_fault=reason == "engine_failed")
        else:
            self._begin(placement, self._loop.time())

    def _begin(self, placement: Placement, now: float) -> None:
        if placement.engine.hands_over and (whole := self._out.divisible(placement.engine)) is not None:
            self._leg, self._prefilled = begin_leg(self._services, whole, self._prompt, placement, self)
        self._out.room = self._leg.room if self._leg is not None else {}
        if not self._out.room and placement.engine.needs_room(self._endpoint):
            self._next_engine("no_prefill_engine", is_fault=False)
        elif self._leg is None or self._out.room:
            self._connect(placement, now)

    def leg_over(self, ticket: dict[str, Any] | None) -> None:
        """The prefill engine has computed the prompt, or the decode engine must."""
        leg, self._leg, placement = self._leg, None, self._placement
        assert leg is not None
        assert placement is not None
        self._prefilled = (leg.engine_name if ticket is not None else "", leg.reason)
        if leg.room:
            if leg.refusal is not None and not self._relaying:
                told = self._explain(leg.placement, self._loop.time())
                self._leave_engine()
                self._conclude(leg.refusal.status, "engine_answer", leg.answer_bytes(told))
            elif ticket is None and (not self._relaying or self._out.resuming):
                self._in_another_room("prefill_failed")
            return
        self._out.ticket = ticket
        if ticket is None:
            self._services.router.prefill_came_back(placement)
        self._attempt_started = self._loop.time()
        self._connect(placement, self._attempt_started)

    def _connect(self, placement: Placement, now: float) -> None:
        self._heard = now
        connection = placement.engine.pool.take(now) if self._stale < _STALE_RETRIES else None
        self._reused = connection is not None
        if connection is not None:
            self._send(placement, connection)
        else:
            self._dial = placement.engine.pool.dial(self)

    def on_dialled(self, connection: UpstreamConnection | None, reason: str) -> None:
        self._dial = None
        placement = self._placement
        if self.over or placement is None:
            if connection is not None:
                connection.abandon()
        elif connection is None or not connection.is_open:
            self._next_engine(reason or "connection_lost")
        else:
            self._send(placement, connection)

    def _send(self, placement: Placement, connection: UpstreamConnection) -> None:
        self._up = connection
        if not self._out.resuming:
            self._head = self._frames = None
        data, reader = self._out.begin(placement, self._services.limits.max_head_bytes)
        connection.begin(self, reader, data)
        if connection.transport is not None:
            self._client.flow.attach(connection.transport)

    # --- from the engine (ResponseSink)

    def seconds_left(self) -> float:
        """Until the deadline of what the engine says next."""
        assert self._placement is not None
        limits, now = self._placement.engine.timeouts, self._loop.time()
        if self._client.flow.was_paused():  # a client too slow to take what came: the engine is not at fault
            self._heard = now
        return self._heard + (limits.idle_seconds if self._has_begun() else limits.first_byte_seconds) - now

    def on_late(self) -> None:
        if self._has_begun():
            self._broken("idle_timeout")
            return
        if self._leg is not None:  # in a room whose other half has not answered: either of them hangs
            self._leg.cancel("timeout")
        self._next_engine("first_byte_timeout")

    def _has_begun(self) -> bool:
        """True while the engine at work has said something that was relayed."""
        return self._relaying and not self._out.resuming

    def on_head(self, head: ResponseHead) -> None:
        if self._out.room and head.status >= 500:
            self._in_another_room(f"status_{head.status}")
            return
        if self._out.resuming:
            if head.status != 200 or not head.is_events:
                self._next_engine(f"status_{head.status}", is_fault=not 400 <= head.status < 500)
            return
        if self._out.may_go_on(head.status) and self._services.router.another(self._prompt, self._tried):
            self._next_engine(f"status_{head.status}")
            return
        self._head = head
        if self._out.tape is not None:
            if head.status != 200 or not head.is_events or not head.chunked:
                self._out.tape = None
            self._frames = self._out.tape or (PlainFrames() if head.chunked else None)

    def on_body(self, data: bytes) -> None:
        self._heard = self._loop.time()
        if self._meter is not None:
            self._meter.saw(data)
        frames = self._frames
        if frames is not None:
            data = frames.feed(data)
            if frames.failed:
                self._relay(data)
                self._lost(frames.failed)
            if frames.failed or not data:
                return
        self._relay(data)
        self._last = data

    def _relay(self, data: bytes) -> None:
        if self._has_begun():
            self._client.write(data)
            if self._first_token:
                self._events += data.count(b"data: ")
        elif data:
            self._begin_relay(data)

    def on_end(self) -> None:
        self._up = None
        frames = self._frames
        if frames is not None:
            last = frames.end()
            if frames.failed:
                self._lost(frames.failed)
                return
            self._relay(last)
        if not self._relaying:
            self._begin_relay(b"")
        head = self._head
        assert head is not None
        if self._events and self._placement is not None:
            self._services.router.stream_ended(self._placement, self._events, self._heard - self._first_token)
        self._leave_engine()
        keep_alive = is_framed(head, self._request.head) and self._request.head.keep_alive
        self._account.close(head.status, "ok" if head.status < 400 else "engine_answer", self._loop.time())
        self._client.finish(keep_alive)
        self.over = True

    def on_lost(self, reason: str) -> None:
        is_new = not self._relaying or self._out.resuming
        if is_new and self._reused and reason == "connection_lost" and not (self._up and self._up.answers):
            # The engine closed an idle connection just as we used it: not its fault, and not a try.
            self._services.metrics.retries.labels("stale_connection").inc()
            self._client.flow.detach()
            self._up, self._stale = None, self._stale + 1
            assert self._placement is not None
            self._connect(self._placement, self._loop.time())
        else:
            self._lost(reason)

    def _lost(self, reason: str) -> None:
        """There is no answer, or no more of it."""
        if self._has_begun():
            self._broken(reason)
        else:
            self._next_engine(reason, is_fault=reason != "not_exact")

    # --- towards the client

    def _begin_relay(self, first: bytes) -> None:
        head, placement = self._head, self._placement
        assert head is not None
        assert placement is not None
        now = self._loop.time()
        if self._out.resuming:
            self._out.resuming = False
            self._services.router.first_byte(placement, 0.0)
            placement.engine.breaker.passed()
            self._services.metrics.resumes.labels("resumed").inc()
            self._client.write(first)
            return
        self._relaying = True
        # Only a stream's first bytes are its first token; any other body comes when all its tokens are there.
        is_token = head.status == 200 and head.is_events
        self._events, self._first_token = 0, now if is_token else 0.0
        self._account.began(placement, head.status, now, now - self._attempt_started, is_token)
        told = self._explain(placement, now)
        self._client.write(response_bytes(head, self._request.head, placement, told) + first)

    def _explain(self, placement: Placement, now: float) -> bytes:
        tries, seconds = self._tried.bit_count(), now - self._attempt_started
        return self._account.explain(placement, tries, now, seconds, self._prefilled)

    def _in_another_room(self, reason: str) -> None:
        """Either half failed, or both: the decode engine of this one may be asked again."""
        assert self._placement is not None
        if self._out.may_meet_again():
            self._tried &= ~(1 << self._placement.engine.slot)
        self._next_engine(reason, is_fault=False)

    def _next_engine(self, reason: str, is_fault: bool = True) -> None:
        """This engine failed before anything was relayed: count it, leave it, try another one."""
        placement = self._placement
        assert placement is not None
        self._services.metrics.retries.labels(reason).inc()
        self._failure = reason
        self._leave_engine()
        if is_fault:
            self._services.router.failed(placement.engine, reason)
        self._attempt()

    def _give_up(self) -> None:
        """No engine is left to try."""
        if self._out.resuming:
            self._services.metrics.resumes.labels(self._failure if self._tried == -1 else "no_engine").inc()
            self._end_broken(200, self._failure)
            return
        standing = self._services.router.standing(self._prompt.model)
        self.turn_away(*refusal(self._failure, self._prompt.asked_model, standing))

    def turn_away(self, status: int, code: str, message: str) -> None:
        """Answer with an error; no engine has this request."""
        self._close(status, self._failure or code, self._client.refuse, status, code, message)

    def _broken(self, reason: str) -> None:
        """The engine was lost in the middle of its answer."""
        head, up, placement = self._head, self._up, self._placement
        assert head is not None
        assert placement is not None
        at_boundary = up is not None and up.reader is not None and up.reader.at_boundary
        self._services.router.failed(placement.engine, reason)
        self._leave_engine()
        can_tell = self._out.tape is not None or (at_boundary and may_speak(head, self._request.head, self._last))
        if not (head.is_events and self._resume(1 << placement.engine.slot, reason)):
            self._end_broken(head.status, reason, can_tell)

    def _resume(self, lost: int, reason: str) -> bool:
        """Go on with a stream on another engine; False if that cannot be."""
        outcome, said = self._out.plan_rest(self._services.router.max_model_tokens(self._prompt.model))
        if outcome != "go_on":
            self._services.metrics.resumes.labels(outcome).inc()
            if outcome == "concluded":
                self._conclude(200, "ok", said)
            return outcome == "concluded"
        self._failure = reason
        if not self._services.router.another(self._prompt, self._tried):
            self._tried = lost  # those that failed this request before may be well again
        self._attempt()
        return True

    def _end_broken(self, status: int, reason: str, may_speak: bool = True) -> None:
        """End an answer that cannot be made whole."""
        head = self._head
        assert head is not None
        if may_speak:  # it is a whole answer then: closing would lose the next request
            said = stream_error_bytes("the engine was lost in the middle of this answer; try again")
            self._conclude(status, reason, said)
        else:
            self._close(status, reason, self._client.cut, not is_framed(head, self._request.head))

    # --- endings

    def on_fault(self) -> None:
        """A mistake of ours ends this request and no other."""
        self._services.metrics.internal_errors.inc()
        if self.over:
            return
        self._failure = CODE
        try:
            self._leave_engine()
            if self._relaying:
                self._end_broken(200, CODE, self._out.tape is not None)
            else:
                self.turn_away(500, CODE, MESSAGE)
        finally:
            if not self.over:  # not even that went as it should
                self.over = True
                self._client.cut(reset=True)

    def _leave_engine(self) -> None:
        """The one place where an exchange lets go of its engines."""
        if self._leg is not None:
            self._leg.cancel()
        if self._dial is not None:
            self._dial.cancel()
        self._leg = self._dial = None
        self._client.flow.detach()
        up, self._up = self._up, None
        if up is not None:
            up.abandon()
        placement, self._placement = self._placement, None
        if placement is not None:
            self._services.router.release(placement)

    def _conclude(self, status: int, reason: str, said: bytes) -> None:
        """The end of an answer, or all of it, when no engine is at work on it any more."""
        self._client.write(said)
        self._close(status, reason, self._client.finish, self._request.head.keep_alive)

    def _close(self, status: int, reason: str, end: Callable[..., None], *said: object) -> None:
        self._account.close(status, reason, self._loop.time())
        end(*said)
        self.over = True

    def check(self) -> None:
        assert not (self.over and self._placement is not None), "a finished exchange still holds its engine"
        assert not self._relaying or self._head is not None, "relaying without a head"
        assert not (self.over and self._leg is not None), "a finished exchange still has its prompt computed"
        self._out.check()
