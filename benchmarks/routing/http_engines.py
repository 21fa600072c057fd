"""The simulated engines (simulated.py) behind real HTTP, their virtual time running SPEED times as fast as the clock.

    python -m benchmarks.routing.http_engines FIRST_PORT COUNT SPEED CAPACITY_TOKENS

A prompt is text of four characters a token; every 2,048 of them are a block of the trace and begin with its number.
Answers are event streams, an event a token. GET /stats tells prompt tokens, hits and requests of each engine.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import cast

import orjson
import uvloop

from benchmarks.routing.simulated import BLOCK_TOKENS, Running, SimulatedEngine

BLOCK_CHARACTERS = BLOCK_TOKENS * 4
_FILL = "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor " * 30
_ASKED = (b"post /v1/completions ", b"post /v1/chat/completions ")
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def text_of(blocks: Sequence[int], prompt_tokens: int) -> str:
    """The prompt of a request of the trace."""
    parts = [(f"<{block:09d}>" + _FILL[block * 7 % 70 :])[:BLOCK_CHARACTERS] for block in blocks]
    return "".join(parts)[: prompt_tokens * 4]


def blocks_in(text: str) -> list[int]:
    starts = range(0, len(text) - 11, BLOCK_CHARACTERS)
    return [int(text[start + 1 : start + 10]) for start in starts if text[start] == "<"]


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


_TOKEN = _chunk(
    b'data: {"id":"c","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"a "}]}\n\n'
)
_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class HttpEngine:
    """One engine; steps on the loop's clock."""

    def __init__(self, capacity_tokens: int, speed: float) -> None:
        self.core = SimulatedEngine(capacity_tokens)
        self.capacity_tokens = capacity_tokens
        self._speed = speed
        self._streams: dict[Running, asyncio.Transport] = {}
        self._due = 0.0
        self.prompt_tokens = self.hit_tokens = self.requests = 0

    def take(self, running: Running, transport: asyncio.Transport) -> None:
        self.core.waiting.append(running)
        self._streams[running] = transport
        self.requests += 1
        if not self.core.busy:
            self._step()

    def _step(self) -> None:
        seconds = self.core.begin_step()
        if seconds is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        # A step that came late does not delay the ones after it.
        self._due = max(now, self._due if self._due > now - 0.05 else now) + seconds / self._speed
        loop.call_at(self._due, self._step_is_over)

    def _step_is_over(self) -> None:
        before = {one: one.made for one in self.core.running}
        first, done = self.core.end_step()
        for one in first:
            self.prompt_tokens += one.prompt_tokens
            self.hit_tokens += one.hit_tokens
        for one in before.keys() | set(first):
            transport, new = self._streams[one], one in first
            if (one.made > before.get(one, 0) or new) and not transport.is_closing():
                transport.write((_HEAD if new else b"") + _TOKEN)
        for one in done:
            transport = self._streams.pop(one)
            if not transport.is_closing():
                transport.write(_END)
        self._step()


class Connection(asyncio.Protocol):
    """Requests with a Content-Length, one after the other."""

    def __init__(self, engine: HttpEngine, all_engines: Sequence[HttpEngine]) -> None:
        self._engine, self._all = engine, all_engines
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._held += data
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._held[:end].lower()
        place = head.find(b"\r\ncontent-length:")
        length = int(head[place + 17 :].partition(b"\r\n")[0]) if place >= 0 else 0
        if len(self._held) < end + 4 + length:
            return
        body, self._held = self._held[end + 4 : end + 4 + length], self._held[end + 4 + length :]
        if head.startswith(_ASKED):
            asked = orjson.loads(body)
            text = asked["prompt"] if "prompt" in asked else asked["messages"][0]["content"]
            tokens = max(1, len(text) // 4)
            self._engine.take(Running(0, blocks_in(text), tokens, asked.get("max_tokens", 1)), self._transport)
        else:
            status, answer = self._page(head)
            self._transport.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(answer), answer))

    def _page(self, head: bytes) -> tuple[int, bytes]:
        path = (head + b"  ").split(b" ", 2)[1]
        if path == b"/stats":
            return 200, orjson.dumps([[e.prompt_tokens, e.hit_tokens, e.requests] for e in self._all])
        if path == b"/v1/models":
            return 200, orjson.dumps({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]})
        if path == b"/metrics":
            blocks = self._engine.capacity_tokens // 16
            return 200, b'vllm:cache_config_info{block_size="16",num_gpu_blocks="%d"} 1.0\n' % blocks
        return (200, b"{}") if path in (b"/health", b"/get_model_info", b"/model_info") else (404, b"{}")


async def serve(first_port: int, count: int, speed: float, capacity_tokens: int) -> None:
    engines = [HttpEngine(capacity_tokens, speed) for _ in range(count)]
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda engine=engine: Connection(engine, engines), "127.0.0.1", first_port + number)  # type: ignore[misc]
        for number, engine in enumerate(engines)
    ]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    numbers = json.loads("[" + ",".join(sys.argv[1:5]) + "]")
    uvloop.run(serve(*numbers))
