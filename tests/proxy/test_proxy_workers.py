"""Several worker processes on one port: shared work, one admin listener, restarts, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from typing import IO
from urllib.parse import quote

import psutil
import pytest
from dynamo_proxy.metric_merge import merge_pages
from dynamo_proxy.supervisor import hold_port
from dynamo_proxy.workers_admin import merged

from tests.proxy.proxy_fakes import Client, FakeEngine, ask, chat, get, post, run, wait_until
from tests.proxy.test_proxy_admin import admin
from tests.proxy.test_proxy_cli import COMMAND, call, ended, environment, ready
from tools.server_process import free_port


@contextlib.asynccontextmanager
async def workers(
    *arguments: str, count: int = 2
) -> AsyncIterator[tuple[subprocess.Popen[bytes], int, int, list[str]]]:
    """The command with workers: its process, port, admin port, and its lines (whole after the end)."""
    with tempfile.TemporaryFile() as stderr:
        process = spawn([*arguments, "--workers", str(count), "--admin-port", str(free_port())], stderr)
        lines: list[str] = []

        def written() -> str:
            return os.pread(stderr.fileno(), 1 << 20, 0).decode()

        try:
            await wait_until(
                lambda: "listening on" in written() or process.poll() is not None, "the workers listen", 120
            )
            found = re.search(r"listening on http://[^:]+:(\d+), admin http://[^:]+:(\d+)", written())
            assert found is not None, written()
            yield process, int(found[1]), int(found[2]), lines
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            process.wait()
            lines += written().splitlines()
            psutil.wait_procs(children, timeout=20)


def spawn(arguments: list[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [*COMMAND, *arguments, "--port", "0", "--health-interval", "0.1"]
    return subprocess.Popen(command, stderr=stderr, env=environment())


def children(process: subprocess.Popen[bytes]) -> list[int]:
    return sorted(child.pid for child in psutil.Process(process.pid).children())


def test_workers_share_a_port_and_one_admin_listener_speaks_for_all() -> None:
    async def body() -> None:
        first, second = await FakeEngine().start(), await FakeEngine().start()
        async with workers("--engine", first.url) as (process, port, admin_port, lines):
            await wait_until_listed(admin_port, first.url)
            for _ in range(40):
                assert (await ask(port, post("/v1/chat/completions", chat()))).status == 200
            listing = (await admin(admin_port, "GET", "/engines")).json()
            assert (listing["arrivals_total"], len(listing["engines"])) == (40, 1)
            page = (await ask(port, get("/metrics"))).body.decode()
            assert "dynamo_router_arrivals_total 40.0" in page
            assert "dynamo_router_arrivals_total 40.0" in (await ask(admin_port, get("/metrics"))).body.decode()
            await admin(admin_port, "POST", "/engines", {"url": second.url})
            await admin(admin_port, "POST", "/engines/drain", {"url": first.url})
            assert (await admin(admin_port, "POST", "/engines/drain", {"url": "http://127.0.0.1:9"})).status == 404
            before = len(first.requests)
            for _ in range(20):
                await settled(port)
            assert len(first.requests) == before
            assert (await admin(admin_port, "DELETE", "/engines?url=" + quote(first.url))).status == 200
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 0
        assert "Traceback" not in "\n".join(lines)
        await first.stop()
        await second.stop()

    run(body())


async def settled(port: int) -> None:
    """A request answered well: a worker may not have seen the new engine ready yet."""
    for _ in range(200):
        if (await ask(port, post("/v1/chat/completions", chat()))).status == 200:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("no worker became ready")


def test_a_worker_that_dies_is_started_again_and_knows_what_changed() -> None:
    async def body() -> None:
        first, second = await FakeEngine().start(), await FakeEngine().start()
        async with workers("--engine", first.url) as (process, port, admin_port, lines):
            await ready(port)
            added = {"url": f"{second.url},idle=7"}
            await admin(admin_port, "POST", "/engines", added)
            await admin(admin_port, "POST", "/engines/drain", {"url": first.url})
            before = children(process)
            psutil.Process(before[0]).kill()
            await wait_until(lambda: len(children(process)) == 2 and children(process) != before, "a new worker")
            await wait_until_listed(admin_port, second.url)
            assert (await admin(admin_port, "POST", "/engines", added)).status == 200, "its deadline is not known"
            seen = len(first.requests)
            for _ in range(20):
                await settled(port)
            assert len(first.requests) == seen
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 0
        assert "starting it again" in "\n".join(lines)
        await first.stop()
        await second.stop()

    run(body())


async def wait_until_listed(admin_port: int, url: str) -> None:
    for _ in range(400):
        engines = (await admin(admin_port, "GET", "/engines")).json()["engines"]
        states = {row["url"]: row["state"] for row in engines}
        if states.get(url) == "ready":
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"no worker calls {url} ready")


@pytest.mark.parametrize("count", [1, 2])
def test_it_starts_with_no_engine_at_all_and_serves_when_one_is_added(count: int) -> None:
    """As a planner does that keeps nothing running."""

    async def body() -> None:
        engine = await FakeEngine().start()
        async with workers(count=count) as (process, port, admin_port, lines):
            answer = await ask(port, post("/v1/chat/completions", chat()))
            assert (answer.status, "retry-after" in answer.headers) == (503, True)
            assert (await admin(admin_port, "POST", "/engines", {"url": engine.url})).status == 200
            await settled(port)
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 0
        assert "\n".join(lines).count("no engine given") == 1
        await engine.stop()

    run(body())


def test_workers_end_with_their_supervisor() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with workers("--engine", engine.url) as (process, port, _, _):
            await ready(port)
            mine = [psutil.Process(pid) for pid in children(process)]
            process.kill()
            await wait_until(lambda: not any(alive(child) for child in mine), "the workers end")
        await engine.stop()

    run(body())


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_stream_in_a_worker_may_finish_at_shutdown() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        engine.hold = asyncio.Event()
        async with workers("--engine", engine.url) as (process, port, _, _), Client.to(port) as client:
            await ready(port)
            client.send(post("/v1/chat/completions", chat(stream=True)))
            await client.head()
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                for _ in range(500):
                    await ask(port, get("/health"))
                    await asyncio.sleep(0.01)
                raise AssertionError("still accepting")
            engine.hold.set()
            assert b"".join([chunk async for chunk in client.chunks()]).endswith(b"[DONE]\n\n")
            assert await ended(process) == 0
        await engine.stop()

    run(body())


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments in (["--port", port, "--admin-port", "0"], ["--port", "0", "--admin-port", port]):
            code, stderr = call("--engine", "http://127.0.0.1:1", "--workers", "2", *arguments)
            assert (code, stderr.count("\n")) == (2, 1), stderr
            assert "in use" in stderr


def test_connections_that_a_proxy_of_before_closed_do_not_hold_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as before:  # as a proxy without workers listens
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = before.accept()
            accepted.close()  # first, so that this side waits
            assert client.recv(1) == b""
    hold_port("127.0.0.1", port).close()


def test_pages_are_merged_by_kind() -> None:
    page = "\n".join(
        [
            "# HELP c_total x", "# TYPE c_total counter", 'c_total{a="b c"} 2.0', "# HELP g x", "# TYPE g gauge",
            "g 3.0", "# HELP dynamo_router_in_flight_requests x", "# TYPE dynamo_router_in_flight_requests gauge",
            'dynamo_router_in_flight_requests{engine="e"} 1.0', "",
        ]
    )  # fmt: skip
    lines = merge_pages([page, page]).splitlines()
    assert 'c_total{a="b c"} 4.0' in lines
    assert "g 3.0" in lines
    assert 'dynamo_router_in_flight_requests{engine="e"} 2.0' in lines
    assert lines.count("# TYPE g gauge") == 1
    assert merge_pages([]) == ""


@pytest.mark.parametrize("states", [("ready", "down"), ("down", "ready")])
def test_a_state_that_is_not_ready_anywhere_is_told(states: tuple[str, str]) -> None:
    row = b'{"url":"u","in_flight":1,"state":"%b","was_ready":%b}'
    rows = [row % (state.encode(), b"true" if state == "ready" else b"false") for state in states]
    assert merged(rows) == {"url": "u", "in_flight": 2, "state": "down", "was_ready": True}
