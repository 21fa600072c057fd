"""The whole planner on fake peers: ticks, log, metrics, control port, and the command line around it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
from dynamo_planner.child_process import group_alive
from dynamo_planner.cli import main
from dynamo_planner.control import ControlPort
from dynamo_planner.decision_log import replay
from dynamo_planner.errors import ConfigError

from tests.planner.planner_fakes import Bench, FakeEngine, bench, child_command, served, vllm_text


async def ask(stand: Bench, method: str, url: str, body: object = None) -> tuple[int, str]:
    async with stand.session.request(method, url, json=body) as answer:
        return answer.status, await answer.text()


def test_advice_is_logged_counted_once_and_replayed(tmp_path: Path) -> None:
    async def story() -> None:
        engine = FakeEngine(vllm_text(kv=0.95))
        async with served(engine.app()) as url, bench(tmp_path, engine=(url, "http://127.0.0.1:9")) as stand:
            for scale in (1.0, 2.0, 0.5):
                engine.text = vllm_text(kv=0.95, waiting=9, running=3, scale=scale)
                decision, outcome = await stand.planner.tick()
                assert (decision.desired, outcome.accepted, outcome.reason) == (5, False, "advisory")
            metrics = stand.planner.parts.metrics
            labels = {"pool": "default", "mode": "advisory", "direction": "up", "reason": "queue"}
            assert metrics.value("dynamo_planner_scaling_events_total", **labels) == 1
            assert metrics.value("dynamo_planner_desired_replicas", pool="default") == 5
            assert metrics.value("dynamo_planner_current_replicas", pool="default") == 2
            assert metrics.value("dynamo_planner_observation_failures_total", reason="unreachable") == 3
            assert "advisory: would start 3 replica(s)" in stand.said[-1]
            assert sum("cannot read http://127.0.0.1:9" in line for line in stand.said) == 1
        report = replay((tmp_path / "decisions.jsonl").read_text().splitlines())
        assert (report.decisions, report.differences) == (3, ())

    asyncio.run(story())


def test_a_scale_command_restarts_nothing_and_says_so(tmp_path: Path) -> None:
    async def story() -> None:
        called = tmp_path / "called"
        settings = {"advisory": False, "scale_command": f"touch {called}", "engine": ("http://127.0.0.1:9",)}
        async with bench(tmp_path, **settings) as stand:
            port = ControlPort(stand.fleet, 60.0, time.monotonic)
            base = f"http://127.0.0.1:{await port.start('127.0.0.1', 0)}"
            try:
                status, said = await ask(stand, "POST", base + "/restart", {})
            finally:
                await port.close()
            assert (status, "by your own means" in said, called.exists()) == (409, True, False)

    asyncio.run(story())


def test_the_control_port(tmp_path: Path) -> None:
    async def story() -> None:
        engine = FakeEngine()
        async with served(engine.app()) as url, bench(tmp_path, engine=(url,)) as stand:
            port = ControlPort(stand.fleet, 60.0, time.monotonic)
            base = f"http://127.0.0.1:{await port.start('127.0.0.1', 0)}"
            try:
                await stand.planner.tick()
                assert (await ask(stand, "GET", f"{base}/health"))[0] == 200
                assert (
                    'dynamo_planner_tick_seconds_count{pool="default"} 1.0'
                    in (await ask(stand, "GET", f"{base}/metrics"))[1]
                )
                assert '"reason": "steady"' in (await ask(stand, "GET", f"{base}/decisions?n=1"))[1]
                assert (await ask(stand, "GET", f"{base}/decisions?n=x"))[0] == 400
                status, text = await ask(stand, "POST", f"{base}/scale", {"replicas": 2})
                assert status == 409
                assert "advisory" in text
                for body in ({"replicas": "2"}, {"replicas": True}, [], {}):
                    assert (await ask(stand, "POST", f"{base}/scale", body))[0] == 400
                assert "bounds 1..8" in (await ask(stand, "POST", f"{base}/scale", {"replicas": 99}))[1]
                with pytest.raises(ConfigError, match="choose another --port"):
                    await ControlPort(stand.fleet, 60.0, time.monotonic).start("127.0.0.1", int(base[-5:]))
            finally:
                await port.close()

    asyncio.run(story())


def test_a_manual_order_starts_and_drain_stops_one_more(tmp_path: Path) -> None:
    async def story() -> None:
        settings = {
            "advisory": False,
            "engine_command": child_command(tmp_path),
            "stabilisation_seconds": 300,
        }
        engine = FakeEngine()
        async with served(engine.app()) as url, bench(tmp_path, engine=(url,), **settings) as stand:
            port = ControlPort(stand.fleet, 60.0, time.monotonic)
            base = f"http://127.0.0.1:{await port.start('127.0.0.1', 0)}"
            try:
                status, text = await ask(stand, "POST", f"{base}/scale", {"replicas": 2})
                assert status == 202
                assert '"reason": "manual"' in text
                await stand.until("ready http")
                assert (await stand.planner.tick())[0].reason == "stabilising"
                assert (await ask(stand, "POST", f"{base}/scale", {"replicas": 2}))[0] == 200
                assert (await ask(stand, "POST", f"{base}/scale", {"replicas": 1}))[0] == 202
                await stand.until("stopped http")
                labels = {"pool": "default", "mode": "actuate", "direction": "down", "reason": "manual"}
                assert stand.planner.parts.metrics.value("dynamo_planner_scaling_events_total", **labels) == 1
            finally:
                await port.close()

    asyncio.run(story())


def test_a_tick_that_fails_is_counted_and_the_next_one_runs(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, engine=("http://127.0.0.1:9",)) as stand:
            stop, real = asyncio.Event(), stand.fleet.tick
            ticks = 0

            async def faulty():  # type: ignore[no-untyped-def]
                nonlocal ticks
                ticks += 1
                if ticks == 1:
                    raise RuntimeError("a bug")
                stop.set()
                return await real()

            stand.fleet.tick = faulty  # type: ignore[method-assign]
            await stand.fleet.run(0.01, stop)
            assert ticks == 2
            assert any("a bug" in line for line in stand.said)

    asyncio.run(story())


BASE = ["--engine", "http://127.0.0.1:9"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to observe"),
        (["--engine", "foo"], "http://host:port"),
        (["--engine", "ftp://a:1"], "http://host:port"),
        (["--engine", "http://a:99999"], "http://host:port"),
        ([*BASE, *BASE], "named twice"),
        (["--proxy-admin", "localhost:9"], "http://host:port"),
        ([*BASE, "--min-replicas", "0"], "min_replicas"),
        ([*BASE, "--max-replicas", "99999"], "max_replicas"),
        ([*BASE, "--min-replicas", "4", "--max-replicas", "2"], "above max_replicas"),
        ([*BASE, "--min-replicas", "x"], "valid integer"),
        ([*BASE, "--interval-seconds", "0"], "interval_seconds"),
        ([*BASE, "--interval-seconds", "nan"], "interval_seconds"),
        ([*BASE, "--optimization-target", "magic"], "'load', 'sla'"),
        ([*BASE, "--optimization-target", "sla"], "give at least one"),
        ([*BASE, "--target-ttft-ms", "100"], "optimization_target sla"),
        ([*BASE, "--optimization-target", "sla", "--target-ttft-ms", "-1"], "target_ttft_ms"),
        ([*BASE, "--burst-factor", "5"], "optimization_target sla"),
        ([*BASE, "--port", "70000"], "port"),
        ([*BASE, "--no-advisory"], "engine_command"),
        ([*BASE, "--no-advisory", "--engine-command", "vllm serve m"], "{port}"),
        ([*BASE, "--no-advisory", "--engine-command", "vllm 'serve {port}"], "quotes"),
        ([*BASE, "--engine-port-range", "9-1"], "8100-8199"),
        ([*BASE, "--engine-port-range", "many"], "8100-8199"),
        ([*BASE, "--decision-log", "/nope/x.jsonl"], "--decision-log"),
        ([*BASE, "--no-advisory", "--engine-command", "sleep {port}", "--port", "8150"], "move one of them"),
        (["--config", "/nope.yaml"], "--config"),
        (["--config", "/"], "--config"),
        (["--bogus"], "--bogus"),
        (["stray"], "stray"),
        (["--replay", "/nope.jsonl"], "--replay"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dynamo-planner: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"engine: [", "is not YAML at line"),
        (b"- a\n- b\n", "holds no settings"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"min_replcas: 2\n", "unknown key 'min_replcas'"),
        (b"engine: 7\n", "engine"),
        (b"engine: http://a:1\nmax-replicas: lots\n", "max_replicas"),
    ],
)
def test_a_bad_file_is_one_line(content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "planner.yaml"
    file.write_bytes(content)
    assert main(["--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dynamo-planner: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main([*BASE, "--port", str(taken.getsockname()[1])]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "choose another --port" in err


def test_help_fits_a_terminal_and_names_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 80 columns no flag is cut, and whoever reads the help learns of the other command."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--max-running-per-replica", "--keep-replicas / --stop-replicas", "--scale-to-zero-seconds"):
        assert flag in shown
    assert "dynamo-planner profile --engine" in " ".join(shown.split())
    assert main(["profile", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: dynamo-planner profile" in shown
    assert "--prompt-tokens" in shown


def test_flags_win_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "planner.yaml"
    file.write_text("engine: http://a:1\nmin-replicas: 3\nmax-replicas: 5\n")
    assert main(["--config", str(file), "--max-replicas", "2"]) == 2
    assert "min_replicas 3 is above max_replicas 2" in capsys.readouterr().err


def planner_process(*arguments: str) -> subprocess.Popen[str]:
    """The real command, as a process of its own."""
    program = "from dynamo_entrypoints.planner_cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--port", "0", "--interval-seconds", "0.2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def lived(arguments: list[str], true: Callable[[str], bool], number: signal.Signals) -> str:
    """One planner's life: it gets `number` when what it said is as wanted. Returns all it said."""
    planner, heard = planner_process(*arguments), ""
    assert planner.stdout is not None
    try:
        for line in planner.stdout:
            heard += line
            if true(heard):
                break
        planner.send_signal(number)
        heard += planner.stdout.read()
        assert planner.wait(30) == (-number if number == signal.SIGKILL else 0), heard
    finally:
        planner.kill()
        planner.wait()
        planner.stdout.close()
    return heard


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_planner_and_its_replicas(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "decisions.jsonl"
    arguments = ["--no-advisory", "--engine-command", child_command(tmp_path, "grandchild"), "--decision-log", str(log)]
    quick = ["--engine-port-range", "18200-18250", "--terminate-seconds", "0.5", "--engine-log-dir", str(tmp_path)]
    heard = lived([*arguments, *quick], lambda said: "ready http" in said, number)
    found = re.search(r"process (\d+)", heard)
    assert found is not None, heard
    assert not group_alive(int(found[1])), heard
    assert "stopped http" in heard
    assert main(["--replay", str(log)]) == 0


def test_killed_again_and_again_it_gives_nothing_up_and_then_goes_on(tmp_path: Path) -> None:
    """SIGKILL in its first ticks, four times over an idle fleet of three; the fifth lives and comes down."""
    orders, log = tmp_path / "orders", tmp_path / "decisions.jsonl"
    command = f"sh -c 'echo {{replicas}} >> {orders}'"

    async def story() -> None:
        async with AsyncExitStack() as stack:
            urls = [
                await stack.enter_async_context(served(FakeEngine(vllm_text(running=0, kv=0.1)).app()))
                for _ in range(3)
            ]
            engines = [word for url in urls for word in ("--engine", url)]
            same = ["--no-advisory", "--scale-command", command, *engines, "--decision-log", str(log)]
            same += ["--memory-file", str(tmp_path / "memory"), "--stabilisation-seconds"]
            for killed_at in (1, 2, 3, 5):
                enough = partial(_has_ticked, killed_at)
                await asyncio.to_thread(lived, [*same, "600"], enough, signal.SIGKILL)
                assert not orders.exists(), "a planner that had watched for a few ticks gave a replica up"
            heard = await asyncio.to_thread(
                lived, [*same, "1"], lambda _: orders.exists() and bool(orders.read_text()), signal.SIGTERM
            )
            assert "goes on from" in heard
            assert orders.read_text().split()[0] == "1"

    asyncio.run(story())
    assert main(["--replay", str(log)]) == 0


def _is_written(file: Path) -> bool:
    return file.exists() and bool(file.read_text())


def _has_ticked(count: int, said: str) -> bool:
    return said.count("3 -> 3") >= count


def test_importing_the_package_is_light() -> None:
    program = "import sys, dynamo_planner, dynamo_planner.cli; print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    heavy = {"aiohttp", "pydantic", "typer", "asyncio", "prometheus_client", "yaml", "rich"}
    assert not heavy & set(loaded.stdout.split())
