"""`python -m soak.proxy`: engines fail at random behind dynamo-proxy; status 1 for a request that was lost or an answer
that is wrong, and for what is left open afterwards.

Engines compute in float32 and only prompts are asked that all of them answer alike, so that every answer is compared
letter by letter, whoever began it and whoever ended it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from soak.proxy.fleet import BOOT_SECONDS, Chaos, Engine
from soak.proxy.gate import Gate
from soak.proxy.traffic import Case, Clients, Tally, right_answers
from tools.server_process import ServerProcess, free_port
from tools.sglang_server import sglang_server
from tools.tiny_model import make_model
from tools.vllm_server import MODEL_NAME, VllmOptions, vllm_server

_CANDIDATES, _FEWEST_CASES = 40, 8
_QUIET_SECONDS = 10.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m soak.proxy", description=(__doc__ or "").split(";")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--vllm", type=int, default=2, help="vLLM engines")
    parser.add_argument("--sglang", type=int, default=1, help="SGLang engines (from .envs/sglang)")
    parser.add_argument("--pause-seconds", type=float, default=8.0, help="mean pause between two faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where logs go (default: a temporary folder)")
    options = parser.parse_args(arguments)
    if options.vllm + options.sglang < 2:
        parser.error("two engines at least: one is always left alone")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return asyncio.run(run(folder, options))


async def run(folder: Path, options: argparse.Namespace) -> int:
    model = await asyncio.to_thread(make_model, folder / "model")
    servers = [_vllm(number, model, folder) for number in range(options.vllm)]
    servers += [_sglang(number, model, folder) for number in range(options.sglang)]
    async with contextlib.AsyncExitStack() as stack:
        engines = []
        for server in servers:
            engine = Engine(server, await Gate(int(server.url.rsplit(":", 1)[1])).start())
            stack.push_async_callback(engine.gate.stop)
            stack.push_async_callback(asyncio.to_thread, server.stop)
            engines.append(engine)
        await asyncio.gather(*(engine.boot() for engine in engines))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=BOOT_SECONDS))
        )
        cases = await right_answers(session, [server.url for server in servers], _CANDIDATES)
        print(f"{len(engines)} engines answer {len(cases)} of {_CANDIDATES} prompts alike", flush=True)
        if len(cases) < _FEWEST_CASES:
            print("soak.proxy: the engines agree on too few prompts to compare anything", file=sys.stderr)
            return 2
        proxy, admin = await stack.enter_async_context(_proxy(engines, folder))
        return await _soak(engines, cases, (proxy, admin, session), options)


async def _soak(
    engines: list[Engine], cases: list[Case], parts: tuple[ServerProcess, str, aiohttp.ClientSession], options: Any
) -> int:
    proxy, admin, session = parts
    warm = Clients(proxy.url, cases, options.streams, options.seed)
    await warm.start()
    await asyncio.sleep(_QUIET_SECONDS)
    await warm.stop()
    before = await _left_open(proxy, admin, session)
    print(f"before: {before}", flush=True)
    clients = Clients(proxy.url, cases, options.streams, options.seed + 1)
    chaos = Chaos(engines, admin, session, random.Random(options.seed), options.pause_seconds)
    await clients.start()
    teller, started = asyncio.ensure_future(_tell(clients.tally, chaos)), time.monotonic()
    try:
        await chaos.run(options.minutes * 60)
    finally:
        await clients.stop()
        teller.cancel()
    seconds = time.monotonic() - started
    after = await _left_open(proxy, admin, session)
    async with session.get(f"{admin}/metrics") as answer:
        metrics = await answer.text()
    return _report(clients.tally, chaos, (before, after, seconds), metrics)


async def _tell(tally: Tally, chaos: Chaos) -> None:
    told = 0
    while True:
        await asyncio.sleep(30)
        print(f"{time.strftime('%H:%M:%S')} {dict(tally.ended)}; faults {dict(chaos.done)}", flush=True)
        for line in tally.faults[told:]:
            print(f"  {line}", flush=True)
        told = len(tally.faults)


async def _left_open(proxy: ServerProcess, admin: str, session: aiohttp.ClientSession) -> dict[str, int]:
    """Descriptors and requests of a proxy that nobody asks: its connections to engines have closed by then."""
    await asyncio.sleep(_QUIET_SECONDS)
    assert proxy.process is not None
    async with session.get(f"{admin}/engines") as answer:
        engines = (await answer.json())["engines"]
    folder = Path(f"/proc/{proxy.process.pid}")
    memory = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return {
        "descriptors": len(list((folder / "fd").iterdir())),
        "requests in flight": sum(engine["in_flight"] for engine in engines),
        "RSS MiB": int(memory.split()[1]) // 1024,
    }


def _report(tally: Tally, chaos: Chaos, open_: tuple[dict[str, int], dict[str, int], float], metrics: str) -> int:
    before, after, seconds = open_
    wanted = ("dynamo_router_retries_total", "dynamo_router_stream_resumes_total", "dynamo_router_breaker_trips_total")
    for line in [*chaos.log, *(line for line in metrics.splitlines() if line.startswith(wanted))]:
        print(f"  {line}")
    left = [
        f"{what}: {before[what]} before, {after[what]} after" for what in list(before)[:2] if after[what] > before[what]
    ]
    print(f"minutes    {seconds / 60:.1f}")
    print(f"requests   {sum(tally.ended.values())}: {dict(tally.ended)}, {tally.tokens} tokens compared")
    print(f"begun by   {dict(sorted(tally.engines.items()))}")
    print(f"faults     {sum(chaos.done.values())}: {dict(chaos.done)}")
    print(f"left open  {before} before, {after} after")
    print(f"lost or wrong: {len(tally.faults)}; left behind: {len(left)}")
    for line in [*tally.faults, *left]:
        print(f"  {line}")
    return 1 if tally.faults or left else 0


@contextlib.asynccontextmanager
async def _proxy(engines: list[Engine], folder: Path) -> AsyncIterator[tuple[ServerProcess, str]]:
    port, admin_port = free_port(), free_port()
    command = [str(Path(sys.executable).parent / "dynamo-proxy"), "--port", str(port), "--admin-port", str(admin_port)]
    command += ["--connect-timeout", "5", "--request-timeout", "60", "--idle-timeout", "25", "--health-interval", "1"]
    for engine in engines:
        command += ["--engine", engine.url]
    server = ServerProcess("proxy", command, f"http://127.0.0.1:{port}", folder / "proxy.log")
    server.start()
    try:
        admin = f"http://127.0.0.1:{admin_port}"
        async with aiohttp.ClientSession() as session:
            for _ in range(600):
                await asyncio.sleep(0.1)
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{admin}/engines") as answer:
                        if all(each["state"] == "ready" for each in (await answer.json())["engines"]):
                            break
            else:
                raise RuntimeError(f"the proxy does not find its engines ready (log: {server.log})")
        yield server, admin
    finally:
        await asyncio.to_thread(server.stop)


def _vllm(number: int, model: Path, folder: Path) -> ServerProcess:
    options = VllmOptions(512, 1024, free_port(), ["--dtype", "float32"])
    return vllm_server(f"vllm-{number}", model, folder / f"vllm-{number}.log", options)


def _sglang(number: int, model: Path, folder: Path) -> ServerProcess:
    name = f"sglang-{number}"
    extra = ["--dtype", "float32", "--served-model-name", MODEL_NAME, "--max-total-tokens", "16384"]
    return sglang_server(name, model, folder / f"{name}.log", extra)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
