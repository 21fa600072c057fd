"""Small real engines on 127.0.0.1, a proxy in the same loop, and raw HTTP clients. Nothing here is mocked."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from random import Random
from typing import Any, Protocol, TypeVar

import orjson
import uvloop
from aiohttp import web
from dynamo_proxy.config import EngineAddress, Limits, ProxyConfig, Timeouts
from dynamo_proxy.server import ProxyServer

T = TypeVar("T")
Started = TypeVar("Started", bound="RawServer")
QUICK = Timeouts(
    connect_seconds=1.0,
    first_byte_seconds=10.0,
    idle_seconds=10.0,
    drain_seconds=5.0,
    probe_interval_seconds=0.05,
    probe_timeout_seconds=2.0,
    replay_seconds=0.5,
)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a test's body. What a failed body left open must be a warning, not an error: an error in uvloop's
    warning about an unclosed handle leaves its `close()` waiting for ever.
    """

    async def guarded() -> T:
        try:
            return await work
        finally:
            warnings.simplefilter("always", ResourceWarning)  # pytest restores the filters after each test

    return uvloop.run(guarded())


async def wait_until(condition: Callable[[], bool], what: str = "condition", seconds: float = 30) -> None:
    for _ in range(int(seconds * 100)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never came true: {what}")


class FakeEngine:
    """An engine that speaks OpenAI: answers, streams, tokenises by characters, and records what it saw."""

    def __init__(self, models: tuple[str, ...] = ("tiny",)) -> None:
        self.models = models
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.aborted = 0
        self.active = 0
        self.status = 200
        self.healthy = True
        self.chunks = 3
        self.hold: asyncio.Event | None = None  # streams wait here after their first chunk
        self.event_sources: dict[str, Any] | None = None
        self.server_info: dict[str, Any] | None = None
        self.metrics_text = ""
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> EngineAddress:
        return EngineAddress("127.0.0.1", self.port)

    @property
    def url(self) -> str:
        return self.address.url

    async def start(self, port: int = 0) -> FakeEngine:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/kv_event_sources", self._sources)
        app.router.add_get("/server_info", self._info)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return [orjson.loads(body) for path, _, body in self.requests if path.startswith("/v1/") and body]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "created": 1, "owned_by": "test"} for name in self.models]
        return web.json_response({"object": "list", "data": data})

    async def _sources(self, request: web.Request) -> web.Response:
        if self.event_sources is None:
            return web.Response(status=404)
        return web.json_response(self.event_sources)

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(self.server_info) if self.server_info is not None else web.Response(status=404)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics_text)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = body.get("prompt") or "".join(message["content"] for message in body.get("messages", []))
        return web.json_response({"tokens": [ord(letter) for letter in text], "count": len(text)})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((request.path, dict(request.headers), body))
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        asked = orjson.loads(body) if body[:1] == b"{" else {}
        if asked.get("stream"):
            return await self._stream(request)
        return web.json_response(
            {
                "id": "c1",
                "object": "chat.completion",
                "created": 1,
                "model": asked.get("model", ""),
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": "hello"},
                    }
                ],
                "received_bytes": len(body),
            }
        )

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        self.active += 1
        try:
            await response.prepare(request)
            for number in range(self.chunks):
                await response.write(sse_chunk(f"word{number} "))
                if self.hold is not None:
                    await self.hold.wait()
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.active -= 1
        return response


def sse_chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "tiny",
        "choices": [choice],
    }
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]
_CANNED = {
    b"GET /health ": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    b"GET /v1/models ": b"HTTP/1.1 200 OK\r\ncontent-length: 30\r\n\r\n" + b'{"data":[{"id":"tiny"}]}      ',
}


class RawServer:
    """A listener of raw connections on a port of its own, each with a task that `stop` ends."""

    def __init__(self) -> None:
        self.address = EngineAddress("127.0.0.1", 0)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        return self.address.port

    async def start(self: Started) -> Started:
        self._server = await asyncio.start_server(self._begin, "127.0.0.1", 0, limit=1 << 26)
        self.address = EngineAddress("127.0.0.1", self._server.sockets[0].getsockname()[1])
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)

    async def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await self.serve(reader, writer)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        raise NotImplementedError


class RawEngine(RawServer):
    """An engine whose answer to every request is a script over the raw connection."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.requests: list[bytes] = []
        self.connections = 0
        self.lost = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line[15:])
                body = await reader.readexactly(length) if length else b""
                canned = next((answer for start, answer in _CANNED.items() if head.startswith(start)), None)
                if canned is not None:
                    writer.write(canned)
                elif head.startswith((b"GET /kv_event", b"GET /server_info", b"GET /metrics", b"POST /tokenize")):
                    writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                else:
                    self.requests.append(head + body)
                    await self.script(reader, writer, head + body)
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost += 1
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()


class Behind(Protocol):
    """What may stand behind a proxy."""

    @property
    def address(self) -> EngineAddress: ...
    async def stop(self) -> None: ...


@contextlib.asynccontextmanager
async def proxy_before(*engines: Behind, **settings: Any) -> AsyncIterator[ProxyServer]:
    """A started proxy with all engines ready; checks every invariant at the end and leaves no task behind.

    A second one before the same engines is `inner`: the outer one ends the engines and looks for tasks left.
    """
    ready, inner = settings.pop("ready", True), settings.pop("inner", False)
    clock = settings.pop("clock", None)
    settings.setdefault("timeouts", QUICK)
    settings.setdefault("limits", Limits())
    config = ProxyConfig(tuple(engine.address for engine in engines), port=0, admin_port=0, **settings)
    server = ProxyServer(config, Random(7), clock)
    try:
        await server.start()
        if ready:
            await wait_until(lambda: all(engine.takes_requests for engine in server.registry), "engines ready")
        yield server
        server.check()
    finally:
        await server.close()
        for engine in () if inner else engines:
            await engine.stop()
    assert server.ledger.in_flight == 0, "leases left"
    server.ledger.check()
    left = set() if inner else asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left: {left}"


def post(path: str, body: bytes | dict[str, Any], *headers: str) -> bytes:
    payload = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = [f"POST {path} HTTP/1.1", "host: proxy", f"content-length: {len(payload)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + payload


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: proxy", *headers, "", ""]).encode()


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}


class Answer:
    """A response as a client reads it."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def json(self) -> Any:
        return orjson.loads(self.body)


class Client:
    """A raw keep-alive client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator[Client]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> Answer:
        """Read one response head."""
        block = await self.reader.readuntil(b"\r\n\r\n")
        lines = block.decode("latin-1").split("\r\n")
        pairs = (line.split(": ", 1) for line in lines[1:] if ": " in line)
        return Answer(int(lines[0].split(" ")[1]), {name.lower(): value for name, value in pairs}, b"")

    async def answer(self) -> Answer:
        """Read one whole response."""
        answer = await self.head()
        if answer.headers.get("transfer-encoding") == "chunked":
            answer.body = b"".join([chunk async for chunk in self.chunks()])
        elif "content-length" in answer.headers:
            answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
        else:
            answer.body = await self.reader.read()
        return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            size = int((await self.reader.readuntil(b"\r\n")).strip(), 16)
            data = (await self.reader.readexactly(size + 2))[:-2]
            if not size:
                return
            yield data


async def ask(port: int, request: bytes) -> Answer:
    async with Client.to(port) as client:
        client.send(request)
        return await client.answer()


#: What a `RawEngine` says that has nothing to say.
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def answer_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    writer.write(ANSWER)
