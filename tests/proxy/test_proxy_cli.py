"""The command as a process: one clear line per mistake, a clean start without engines, a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

import dynamo_proxy
import pytest
from dynamo_proxy.cli import FLAGS, _warnings, read_config
from dynamo_proxy.config import EngineAddress, parse_engine_url
from dynamo_proxy.errors import ConfigError

from tests.proxy.proxy_fakes import Client, FakeEngine, ask, chat, get, post, run, wait_until

COMMAND = [sys.executable, "-c", "import sys; from dynamo_proxy.cli import main; sys.exit(main())"]
ENGINE = ["--engine", "http://127.0.0.1:1"]


def environment() -> dict[str, str]:
    folder = os.path.dirname(os.path.dirname(dynamo_proxy.__file__))
    return {**os.environ, "PYTHONPATH": folder, "PYTHONWARNINGS": "error", "COLUMNS": "500"}


def call(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=30, check=False, env=environment()
    )
    return done.returncode, done.stderr


def test_mistakes_get_one_clear_line_and_exit_code_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, told in (
            (["--admin-port", "0"], "no engine given"),
            (["--engine", "127.0.0.1:8000"], "http://HOST:PORT"),
            ([*ENGINE, "--router-mode", "psychic"], "round-robin"),
            ([*ENGINE, "--max-body-bytes", "0"], "--max-body-bytes"),
            ([*ENGINE, "--port", "many"], "--port"),
            ([*ENGINE, "--port", port, "--admin-port", "0"], "in use"),
            ([*ENGINE, "--port", "0", "--admin-port", port], "--admin-port"),
            ([*ENGINE, "--host", "203.0.113.7", "--admin-port", "0"], "cannot listen"),
        ):
            code, stderr = call(*arguments)
            assert code == 2, (arguments, stderr)
            assert stderr.startswith("dynamo-proxy: "), stderr
            assert stderr.count("\n") == 1, stderr
            assert told in stderr


@pytest.mark.parametrize(
    "url",
    ["", "x", "http://", "http://a:99999", "http://a:0", "http://a/b", "http://u@a",
     "http://a b",
     "http://[::1", "http://a?x"],
)  # fmt: skip
def test_engine_urls_that_cannot_work_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_engine_url(url)


def test_engine_urls_have_one_form() -> None:
    assert parse_engine_url("http://a:8000/") == EngineAddress("a", 8000)
    assert parse_engine_url("http://a").url == "http://a:80"
    assert parse_engine_url("http://[::1]:5").url == "http://[::1]:5"


def test_what_is_mostly_not_meant_is_one_warning_each(tmp_path: Path) -> None:
    def warnings_of(**settings: Any) -> list[str]:
        values = {**{flag.name: flag.default for flag in FLAGS}, "engine": ["http://a:1"], **settings}
        return list(_warnings(values, read_config(values)))

    key = tmp_path / "key"
    key.write_text("a key of more than sixteen bytes".replace(" ", "-"))
    key.chmod(0o644)
    sync = {"replica_sync_listen": "127.0.0.1:9", "replica_sync_key_file": str(key)}
    for settings, told in (
        ({"engine": ["http://a:1,role=prefill"]}, "only prefill engines"),
        ({"engine": []}, "no engine given"),
        ({"router_mode": "random", "kv_overlap_score_weight": 0.0}, "--kv-overlap-score-weight"),
        ({"router_mode": "random", "router_temperature": 0.5}, "--router-temperature"),
        ({"engine_api_key_file": str(key)}, f"--engine-api-key-file {key} can be read by everybody"),
        (sync, f"--replica-sync-key-file {key} can be read by everybody"),
    ):
        (warning,) = warnings_of(**settings)
        assert told in warning
    key.chmod(0o640)
    assert not warnings_of(**sync, engine_api_key_file=str(key), kv_overlap_score_weight=1.0)
    assert not warnings_of(engine=["http://a:1,role=prefill", "http://b:1,role=decode"])


def spawn(*arguments: str, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [*COMMAND, *arguments, "--port", "0", "--admin-port", "0", "--health-interval", "0.1"]
    return subprocess.Popen(command, stderr=stderr, env=environment())


@contextlib.asynccontextmanager
async def started(
    *arguments: str, until: str = "listening on"
) -> AsyncIterator[tuple[subprocess.Popen[bytes], int, list[str]]]:
    """A proxy process that has said `until`, its port, and its stderr lines (whole after the end)."""
    with tempfile.TemporaryFile() as stderr:
        process = spawn(*arguments, stderr=stderr)
        lines: list[str] = []

        def written() -> str:
            return os.pread(stderr.fileno(), 1 << 20, 0).decode()

        try:
            await wait_until(lambda: until in written() or process.poll() is not None, f"the proxy says {until!r}")
            found = re.search(r"listening on http://[^:]+:(\d+)", written())
            assert found is not None, written()
            yield process, int(found[1]), lines
        finally:
            process.kill()
            process.wait()
            lines += written().splitlines()


async def ended(process: subprocess.Popen[bytes]) -> int | None:
    await wait_until(lambda: process.poll() is not None, "the proxy ended")
    return process.returncode


async def ready(port: int) -> None:
    for _ in range(200):
        if (await ask(port, get("/health"))).status == 200:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the proxy never became ready")


def test_it_starts_without_its_engine_says_so_once_and_gets_ready() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        await engine.stop()
        # The engine may start only when its absence was noticed.
        async with started("--engine", engine.url, until="not reachable yet") as (process, port, lines):
            assert (await ask(port, get("/health"))).status == 503
            await engine.start(engine.port)
            await ready(port)
            assert (await ask(port, post("/v1/chat/completions", chat()))).status == 200
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 0
        text = "\n".join(lines)
        assert text.count(f"{engine.url} is not reachable yet") == 1
        assert "Traceback" not in text
        await engine.stop()

    run(body())


def test_sigterm_lets_a_stream_finish_and_refuses_new_connections() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        engine.hold = asyncio.Event()
        async with started("--engine", engine.url) as (process, port, lines), Client.to(port) as client:
            await ready(port)
            client.send(post("/v1/chat/completions", chat(stream=True)))
            await client.head()
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                for _ in range(500):  # until the listener is closed
                    await ask(port, get("/health"))
                    await asyncio.sleep(0.01)
                raise AssertionError("still accepting")
            engine.hold.set()
            assert b"".join([chunk async for chunk in client.chunks()]).endswith(b"[DONE]\n\n")
            assert await ended(process) == 0
        assert "1 requests in flight" in "\n".join(lines)
        await engine.stop()

    run(body())


@pytest.mark.parametrize("how", ["second signal", "drain time over"])
def test_a_stuck_stream_does_not_keep_it_alive(how: str) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        engine.hold = asyncio.Event()
        limit = "0.2" if how == "drain time over" else "60"
        async with (
            started("--engine", engine.url, "--drain-timeout", limit) as (process, port, lines),
            Client.to(port) as client,
        ):
            await ready(port)
            client.send(post("/v1/chat/completions", chat(stream=True)))
            await client.head()
            process.send_signal(signal.SIGINT)
            if how == "second signal":
                await asyncio.sleep(0.2)
                process.send_signal(signal.SIGINT)
            assert await ended(process) == 0
        assert how in "\n".join(lines) or "drain time is over" in "\n".join(lines)
        assert "Traceback" not in "\n".join(lines)
        await engine.stop()

    run(body())


def test_a_body_that_fails_with_its_engine_open_fails_and_does_not_hang() -> None:
    async def body() -> None:
        await FakeEngine().start()
        raise AssertionError("told")

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("error")
        with pytest.raises(AssertionError, match="told"):
            run(body())
    assert "unclosed" in str(warned[0].message)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("aiohttp", "zmq", "uvloop", "typer")
    code = f"import sys, dynamo_proxy; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "[]"
