"""Stand-ins for what cannot run here: an engine's /metrics, the proxy's admin port, and a child engine
process.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from dynamo_planner.config import PlannerConfig
from dynamo_planner.decision_log import DecisionLog
from dynamo_planner.fleet import Fleet
from dynamo_planner.planner import Planner
from dynamo_planner.service import build_fleet


def vllm_text(running: Any = 1, waiting: Any = 0, kv: Any = 0.5, scale: float = 1.0) -> str:
    """What vLLM 0.24-0.33 publish, cut to the families that matter plus some that must be ignored."""
    label = '{engine="0",model_name="tiny"}'
    return f"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{label} {running}
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{label} {waiting}
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{{engine="0",model_name="tiny",reason="capacity"}} 99.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{label} {kv}
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{label} {1000 * scale}
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{label} {200 * scale}
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{label} 1.7e+09
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1",model_name="tiny"}} 10.0
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="tiny"}} {10 * scale}
vllm:time_to_first_token_seconds_count{label} {10 * scale}
vllm:time_to_first_token_seconds_sum{label} {2 * scale}
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_count{label} {190 * scale}
vllm:inter_token_latency_seconds_sum{label} {3.8 * scale}
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_count{label} {10 * scale}
vllm:request_queue_time_seconds_sum{label} {0.5 * scale}
"""


def sglang_text(running: Any = 1, waiting: Any = 0, kv: Any = 0.5, scale: float = 1.0) -> str:
    label = '{engine_type="unified",model_name="tiny",pp_rank="0",tp_rank="0"}'
    return f"""# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{label} {running}
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{label} {waiting}
# TYPE sglang:token_usage gauge
sglang:token_usage{label} {kv}
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{label} {1000 * scale}
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{label} {200 * scale}
# TYPE sglang:time_to_first_token_seconds histogram
sglang:time_to_first_token_seconds_count{label} {10 * scale}
sglang:time_to_first_token_seconds_sum{label} {2 * scale}
# TYPE sglang:request_time_per_output_token_seconds histogram
sglang:request_time_per_output_token_seconds_count{label} {10 * scale}
sglang:request_time_per_output_token_seconds_sum{label} {0.2 * scale}
"""


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@dataclass
class FakeEngine:
    """An engine's HTTP face; `text` may be changed between scrapes, `mood` is ok, hang or error."""

    text: str = field(default_factory=vllm_text)
    mood: str = "ok"

    async def metrics(self, request: web.Request) -> web.Response:
        if self.mood == "hang":
            await asyncio.sleep(3600)
        return web.Response(text=self.text, status=500 if self.mood == "error" else 200)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self.metrics)
        return app


@dataclass
class FakeProxy:
    """The admin contract of dynamo-proxy. `broken` names calls that answer 500; `calls` records all."""

    states: dict[str, str] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    never_ready: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    arrivals_total: int = 0
    prompt_tokens_total: int = 0

    async def listing(self, request: web.Request) -> web.Response:
        if "list" in self.broken:
            return web.Response(status=500)
        engines = [
            {
                "url": url,
                "state": state,
                "was_ready": url not in self.never_ready,
                "in_flight": self.in_flight.get(url, 0),
                "role": self.roles.get(url, ""),
                "knowledge": "none",
                "models": [],
            }
            for url, state in self.states.items()
        ]
        totals = {"arrivals_total": self.arrivals_total, "prompt_tokens_total": self.prompt_tokens_total}
        return web.json_response({"engines": engines, **totals})

    async def change(self, request: web.Request) -> web.Response:
        url = request.query.get("url") or (await request.json())["url"]
        url, _, option = url.partition(",")
        if option:
            self.roles[url] = option.removeprefix("role=")
        what = {"POST /engines": "register", "DELETE /engines": "remove"}.get(
            f"{request.method} {request.path}", request.path.rpartition("/")[2]
        )
        self.calls.append(what)
        if what in self.broken:
            return web.Response(status=500)
        if what != "register" and url not in self.states:
            return web.Response(status=404)
        if what == "remove":
            if self.in_flight.get(url, 0):
                return web.Response(status=409)
            del self.states[url]
            return web.json_response({})
        self.states[url] = "draining" if what == "drain" else "ready"
        return web.json_response({"url": url, "in_flight": self.in_flight.get(url, 0)})

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/engines", self.listing)
        for path in ("/engines", "/engines/drain", "/engines/resume"):
            app.router.add_post(path, self.change)
        app.router.add_delete("/engines", self.change)
        return app


CHILD = """
import http.server, signal, subprocess, sys, threading
port, flags = int(sys.argv[1]), sys.argv[2:]
if "ignore-sigterm" in flags:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "grandchild" in flags:
    nap = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", nap])
if "dies" in flags:
    sys.exit("no such model: tiny")
running, release, leases = [0], threading.Event(), [0]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body, status, is_leased = b"ok", 200, leases[0]
        if self.path == "/health" and "sick" in flags:
            status = 503
        elif self.path == "/metrics":
            body = ("vllm:num_requests_running %d\\nvllm:num_requests_waiting 0\\n" % running[0]).encode()
            body += b"dynamo_nixl_open_leases %d\\n" % leases[0]
        elif self.path == "/lease":
            leases[0] = 1
        elif self.path == "/work":
            running[0] += 1
            self.send_response(200); self.send_header("Content-Length", "10"); self.end_headers()
            self.wfile.write(b"first"); self.wfile.flush()
            release.wait(60)
            running[0] -= 1
            self.wfile.write(b" last")
            return
        self.send_response(status); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
        # Behind the answer: whoever waits for this stops the process at once.
        if self.path == "/lease" and is_leased:
            leases[0] = 0
        elif self.path == "/release":
            release.set()
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def child_command(folder: Path, *flags: str) -> str:
    """A command template for a real child process that behaves as `flags` say."""
    script = folder / "child.py"
    script.write_text(CHILD)
    return f"{sys.executable} -S -E {script} {{port}} {' '.join(flags)}"


@dataclass
class Bench:
    """A planner with quick deadlines on real children, and what it said."""

    planner: Planner
    fleet: Fleet
    session: aiohttp.ClientSession
    said: list[str]

    async def eventually(self, true: Callable[[], object], limit_seconds: float = 20.0) -> None:
        """Wait until `true()` holds; the limit only ends a test that would hang."""
        end = time.monotonic() + limit_seconds
        while not true():
            assert time.monotonic() < end, f"it never came; heard {self.said}"
            await asyncio.sleep(0.02)
            self.planner.report_happenings()
            self.planner.check()

    async def until(self, word: str) -> str:
        """Wait for a console line with `word`."""
        await self.eventually(lambda: any(word in line for line in self.said))
        return next(line for line in self.said if word in line)


@asynccontextmanager
async def bench(folder: Path, **settings: Any) -> AsyncIterator[Bench]:
    quick = {
        "interval_seconds": 5,
        "poll_seconds": 0.02,
        "terminate_seconds": 5,
        "exit_drain_seconds": 5,
        "engine_log_dir": folder / "logs",
        "decision_log": folder / "decisions.jsonl",
        "engine_port_range": "18100-18199",
        "stabilisation_seconds": 0,
    }
    config = PlannerConfig.model_validate(quick | settings)
    said: list[str] = []
    async with aiohttp.ClientSession() as session:
        fleet = build_fleet(config, session, DecisionLog(config.decision_log), said.append)
        try:
            yield Bench(fleet.first, fleet, session, said)
        finally:
            await fleet.close()
            fleet.check()
