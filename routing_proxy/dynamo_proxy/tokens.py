"""Learns the token ids behind routed prompts by asking their engine to tokenise them, off the hot path and
bounded; asks engines' tokenisers for whoever else must know.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aiohttp
import orjson

from .engines import Engine
from .knowledge import Knowledge
from .metrics import Metrics
from .text_chain import Prompt

_QUEUE_PROMPTS = 256
_WORKERS = 2
_TIMEOUT_SECONDS = 10.0
_MAX_TEXT_BYTES = 1 << 20
log = logging.getLogger("dynamo_proxy")


class TokenLearner:
    """A bounded queue of prompts to tokenise. What does not fit is dropped and counted; nothing waits for
    it.
    """

    def __init__(self, knowledge: Knowledge, metrics: Metrics) -> None:
        self._knowledge = knowledge
        self._metrics = metrics
        self._queue: asyncio.Queue[tuple[Prompt, Engine]] = asyncio.Queue(_QUEUE_PROMPTS)
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._refused: set[tuple[int, str]] = set()

    def start(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._work()) for _ in range(_WORKERS)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def offer(self, prompt: Prompt, engine: Engine) -> None:
        """A prompt was served by an engine. Only engines with events make its ids worth knowing."""
        if not self._knowledge.event_mask or prompt.body is None or not prompt.chain:
            return
        if self._knowledge.memo.knows(prompt.chain[-1]) or (engine.slot, _kind(prompt)) in self._refused:
            return
        if len(prompt.text) > _MAX_TEXT_BYTES:
            self._metrics.tokenizations.labels("too_long").inc()
            return
        try:
            self._queue.put_nowait((prompt, engine))
        except asyncio.QueueFull:
            self._metrics.tokenizations.labels("queue_full").inc()

    def engine_changed(self, slot: int) -> None:
        """An engine is new or restarted: it may tokenise what it refused before."""
        self._refused = {refused for refused in self._refused if refused[0] != slot}

    async def _work(self) -> None:
        while True:
            prompt, engine = await self._queue.get()
            if not self._knowledge.memo.knows(prompt.chain[-1]):
                reason = await self._ask(prompt, engine)
                self._metrics.tokenizations.labels(reason).inc()

    async def _ask(self, prompt: Prompt, engine: Engine) -> str:
        question: dict[str, Any] = {"model": prompt.model} if prompt.model else {}
        question.update(prompt.question or {})
        reason, answer = await self.ask(engine, "/tokenize", question)
        if reason in ("status_404", "status_405", "status_501"):
            self._refused.add((engine.slot, _kind(prompt)))
        if reason:
            return reason
        ids = read_token_ids(answer)
        if not ids:
            return "bad_answer"
        self._knowledge.memo.learn(prompt.chain, len(prompt.text), ids, prompt.root)
        return "learnt"

    async def ask(self, engine: Engine, path: str, question: dict[str, Any]) -> tuple[str, Any]:
        """Ask an engine's tokeniser: why there is no answer (empty: there is), and the answer."""
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        headers = {"content-type": "application/json"}
        try:
            async with self._session.post(
                engine.address.url + path, data=orjson.dumps(question), headers=headers, timeout=timeout
            ) as answer:
                if answer.status != 200:
                    return f"status_{answer.status}", None
                return "", orjson.loads(await answer.read())
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return "engine_failed", None
        except orjson.JSONDecodeError:
            return "bad_answer", None
        except TypeError:  # nested deeper than orjson writes
            return "too_deep", None

    def check(self) -> None:
        assert self._queue.qsize() <= _QUEUE_PROMPTS, "the tokenise queue is over its bound"
        for task in self._tasks:
            assert not task.done(), "a tokenise worker died"


def read_token_ids(answer: Any) -> list[int]:
    """The ids in an engine's /tokenize answer (vLLM and SGLang both call them `tokens`), or an empty list."""
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if isinstance(tokens, list) and len(tokens) == 1 and isinstance(tokens[0], list):
        tokens = tokens[0]
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 62 for token in tokens):
        return []
    return tokens


def _kind(prompt: Prompt) -> str:
    return "text" if isinstance(prompt.body, str) else "chat"
