"""What an engine is sent for one request: the request itself, with token ids asked for, as the decode half of a
disaggregated one, or the rest of a broken stream.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

import orjson

from . import handoff, sglang_tapes, stream_tape
from .engines import Engine
from .http1 import Request, ResponseReader
from .intake import Asked
from .last_resort import Endable, guarded
from .openapi import JSON_ROUTES
from .router import Placement
from .stream_tape import StreamTape
from .tokens import TokenLearner
from .wire import request_bytes

_OF_THE_MOMENT: Final = frozenset((502, 503))
_RESUMES = 3  # per request
_ROOMS = 3  # that one request to SGLang's prefill and decode engines gets beyond its first


class Whole(Endable, Protocol):
    """The request whose rest is sought."""

    over: bool

    def on_rest(self, reason: str) -> None: ...


def _hear(whole: Whole, task: asyncio.Task[str]) -> None:
    if not whole.over:  # its client may have left since the task ended
        whole.on_rest(task.result())


class Outgoing:
    """One request towards engines, attempt by attempt."""

    __slots__ = (
        "_broke",
        "_continuation",
        "_endpoint",
        "_resumes",
        "_rooms",
        "_tapeable",
        "request",
        "resuming",
        "room",
        "tape",
        "ticket",
    )

    def __init__(self, asked: Asked, endpoint: str) -> None:
        self.request = asked.request
        self._tapeable = asked.tapeable
        self._endpoint = endpoint
        self.tape: StreamTape | None = None
        self.ticket: dict[str, Any] | None = None  # from a prefill engine, for one engine and one try
        self.room: dict[str, Any] = {}  # where the halves of a request to SGLang meet
        self.resuming = False
        self._resumes = self._rooms = 0
        self._broke = False  # an engine said 500
        self._continuation = b""  # what asks for the rest of a broken stream

    def begin(self, placement: Placement, max_head_bytes: int) -> tuple[bytes, ResponseReader]:
        """The bytes for an engine, and who reads its answer."""
        engine = placement.engine
        head, body, target = self.request.head, self.request.body, self.request.head.target
        decode = head.minor_version == 0
        given, self.ticket = self.ticket, None
        if self.resuming and self.tape is not None:
            self.tape.rewind()
            body, target, decode = self._continuation, self.tape.route.encode(), True
            if self.room:
                body = handoff.with_fields(body, self.room)
        else:
            self.tape = None
            params = given if given is not None else placement.hints
            if self.room:
                body = handoff.with_fields(body, self.room)
            elif params and self._endpoint in handoff.PARAMS_ROUTES:
                body = handoff.with_params(body, params)
            if self._tapeable and engine.may_tape(self._endpoint):
                tape = sglang_tapes.tape_for(self._endpoint, engine.kind)
                body, self.tape, decode = tape.asking(body), tape, True
        reader = ResponseReader(head.method, max_head_bytes, decode)
        return request_bytes(head, target, body, engine.host_lines), reader

    def may_go_on(self, status: int) -> bool:
        """True if another engine may do better than this answer. 500 is said by engines that shut down, and by those
        that a request breaks: it must not break them all.
        """
        if status != 500 or self._endpoint not in JSON_ROUTES:  # other routes may have half of their work behind them
            return status in _OF_THE_MOMENT
        self._broke, before = True, self._broke
        return not before

    def divisible(self, engine: Engine) -> Request | None:
        """The request whose prompt another engine may compute; None: none may. The rest of a stream is divided only if
        its engine cannot do without.
        """
        if not self.resuming or self.tape is None:
            return self.request
        route = self.tape.route
        if not engine.needs_room(route):
            return None
        return Request(self.request.head._replace(path=route, target=route.encode()), self._continuation)

    def may_meet_again(self) -> bool:
        """True if the halves of a request to SGLang, of which one failed, may have another room."""
        self._rooms += 1
        return self._rooms <= _ROOMS

    def plan_rest(self, max_model_tokens: int) -> tuple[str, bytes]:
        """What becomes of a broken stream: see stream_tape.plan_rest. "go_on": the next attempt asks for it."""
        if self.tape is None:
            return "not_on_tape", b""
        if self._resumes >= _RESUMES:
            return "too_often", b""
        outcome, said = stream_tape.plan_rest(self.tape, self.request.body, max_model_tokens)
        if outcome == "go_on":
            self._continuation, self.resuming = said, True
            self._resumes += 1
        return outcome, said

    def lacks_rest(self, engine: Engine) -> bool:
        """True if the rest of a stream cannot be asked for yet, or not of this engine."""
        kind = "" if self.tape is None else self.tape.only_kind
        return self.resuming and (not self._continuation or kind not in ("", engine.kind))

    def seek_rest(self, engine: Engine, tokens: TokenLearner, whole: Whole) -> asyncio.Task[str]:
        """Have an engine asked; `whole` hears how it went unless the task is cancelled."""
        task = asyncio.get_running_loop().create_task(self._find_rest(engine, tokens))
        task.add_done_callback(lambda task: None if task.cancelled() else guarded(whole, _hear, whole, task))
        return task

    async def _find_rest(self, engine: Engine, tokens: TokenLearner) -> str:
        """Why it is not known what the request for the rest hangs on; empty: it is."""
        assert self.tape is not None
        if self.tape.asked_kind not in ("", engine.kind):
            return "other_kind"
        steps = self.tape.rest(orjson.loads(self.request.body))
        answer: Any = None
        try:
            while True:
                path, question = steps.send(answer)
                reason, answer = await tokens.ask(engine, path, question)
                if reason:
                    return reason
        except StopIteration as found:
            self._continuation = found.value
        return "" if self._continuation else "not_exact"

    def check(self) -> None:
        assert not self.resuming or self.tape is not None, "resuming without a tape"
        if self.tape is not None:
            self.tape.check()
