"""What the clients of the proxy ask, and how each request ended."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import orjson

from tools.vllm_server import MODEL_NAME

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = 12  # of a prompt: about 60 tokens
TOKENS = 48
#: Longer than any fault lasts.
HUNG_SECONDS = 240.0


class Case(NamedTuple):
    """A prompt, asked as a chat or as a completion, and the one right answer."""

    path: str
    text: str
    right: str


@dataclass
class Tally:
    """How requests ended; `faults` holds a line for each ending that must not be."""

    ended: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    tokens: int = 0

    def add(self, how: str, fault: str = "") -> None:
        self.ended[how] += 1
        if fault:
            self.faults.append(f"{time.strftime('%H:%M:%S')} {how}: {fault}")


def question(path: str, text: str, **fields: Any) -> dict[str, Any]:
    asked = {"model": MODEL_NAME, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **fields}
    return asked | ({"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text})


def texts(count: int) -> list[str]:
    rng = random.Random(20261128)
    return [" ".join(f"{rng.randrange(10**6):06}" for _ in range(WORDS)) for _ in range(count)]


def text_of(answer: dict[str, Any]) -> str:
    """Of one event, or of a whole answer."""
    parts = []
    for choice in answer.get("choices", ()):
        said = choice.get("delta") or choice.get("message")
        parts.append((said.get("content") or "") if said is not None else choice.get("text") or "")
    return "".join(parts)


async def right_answers(session: aiohttp.ClientSession, urls: list[str], count: int) -> list[Case]:
    """The prompts that all engines answer alike when nothing disturbs them: kinds of engine may round apart."""
    asked = [(CHAT if number % 3 == 0 else COMPLETIONS, text) for number, text in enumerate(texts(count))]

    async def one(url: str, path: str, text: str) -> str:
        async with session.post(url + path, json=question(path, text)) as answer:
            answer.raise_for_status()
            return text_of(await answer.json())

    said = [await asyncio.gather(*(one(url, *each) for each in asked)) for url in urls]
    answers = zip(asked, zip(*said, strict=True), strict=True)
    return [Case(*each, alike[0]) for each, alike in answers if len(set(alike)) == 1]


class Clients:
    """So many requests at any time, until `stop`. A share of them is not streamed, a few leave early."""

    def __init__(self, url: str, cases: list[Case], count: int, seed: int, whole: float = 0.1) -> None:
        self._url, self._cases, self._count, self._share_whole = url, cases, count, whole
        self._rng = random.Random(seed)
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None
        self.tally = Tally()

    async def start(self) -> None:
        timeout = aiohttp.ClientTimeout(total=HUNG_SECONDS)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        self._tasks = [asyncio.get_running_loop().create_task(self._run()) for _ in range(self._count)]

    async def stop(self) -> None:
        """Those under way are waited for."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        if self._session is not None:
            await self._session.close()

    async def _run(self) -> None:
        while not self._stopping:
            case, fate = self._rng.choice(self._cases), self._rng.random()
            started = time.monotonic()
            ask: Callable[[Case, float], Awaitable[None]] = self._whole if fate < self._share_whole else self._stream
            try:
                await ask(case, fate)
            except (asyncio.TimeoutError, TimeoutError):
                self.tally.add("hung", f"nothing more in {time.monotonic() - started:.0f} s")
            except (aiohttp.ClientError, OSError) as error:
                self.tally.add("broken", f"{error!r} after {time.monotonic() - started:.1f} s")

    def _post(self, case: Case, **fields: Any) -> Any:
        assert self._session is not None
        return self._session.post(self._url + case.path, json=question(case.path, case.text, **fields))

    async def _whole(self, case: Case, fate: float) -> None:
        async with self._post(case) as answer:
            if answer.status != 200:
                self.tally.add(f"status {answer.status}", (await answer.text())[:200])
                return
            said = orjson.loads(await answer.read())
        self.tally.engines[answer.headers.get("x-dynamo-engine", "")] += 1
        self._judge(case, text_of(said), said.get("usage"))

    async def _stream(self, case: Case, fate: float) -> None:
        leaves_at = self._rng.randrange(TOKENS) if fate > 0.95 else 0
        said, usage, events, done = "", None, 0, False
        async with self._post(case, stream=True, stream_options={"include_usage": True}) as answer:
            if answer.status != 200:
                self.tally.add(f"status {answer.status}", (await answer.text())[:200])
                return
            self.tally.engines[answer.headers.get("x-dynamo-engine", "")] += 1
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                events += 1
                if leaves_at and events > leaves_at:
                    self.tally.add("left")
                    return
                if line.startswith(b"data: [DONE]"):
                    done = True
                    continue
                event = orjson.loads(line[6:])
                if "error" in event:
                    self._judge_told(case, said)
                    return
                said += text_of(event)
                usage = event.get("usage") or usage
        if not done:
            self.tally.add("cut", f"a stream without an end mark after {len(said)} of {len(case.right)} letters")
            return
        self._judge(case, said, usage)

    def _judge(self, case: Case, said: str, usage: dict[str, Any] | None) -> None:
        count = (usage or {}).get("completion_tokens")
        self.tally.tokens += count or 0
        if said != case.right:
            at = next((place for place, pair in enumerate(zip(said, case.right, strict=False)) if pair[0] != pair[1]),
                      min(len(said), len(case.right)))  # fmt: skip
            self.tally.add(
                "wrong", f"{case.path} from letter {at} on: {said[at:][:60]!r}, right {case.right[at:][:60]!r}"
            )
        elif count != TOKENS:
            self.tally.add("miscounted", f"{count} tokens told of {TOKENS}")
        else:
            self.tally.add("right")

    def _judge_told(self, case: Case, said: str) -> None:
        """An answer that broke and could not go on elsewhere: its client was told, after a true beginning."""
        if case.right.startswith(said) and said != "":
            self.tally.add("told")
        else:
            self.tally.add("wrong", f"a broken stream said {said[-60:]!r}")
