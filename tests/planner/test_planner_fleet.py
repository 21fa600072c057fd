"""Several pools under one budget, the hook, sleep and wake, what survives a kill, and the page."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from dynamo_planner.cli import main
from dynamo_planner.config import PlannerConfig, load_config
from dynamo_planner.control import ControlPort
from dynamo_planner.decision import decide, wish
from dynamo_planner.decision_log import DecisionLog, replay
from dynamo_planner.errors import ConfigError
from dynamo_planner.fleet import Fleet
from dynamo_planner.history import Sight
from dynamo_planner.memory_file import MemoryFile, resumed
from dynamo_planner.page import render_page
from dynamo_planner.planner import Planner
from dynamo_planner.profile_file import Profile, models, read_profile, write_profile
from dynamo_planner.records import (
    DecisionInputs,
    Delta,
    EngineObservation,
    FleetObservation,
    Memory,
    ProxyObservation,
    SizingPolicy,
)
from dynamo_planner.service import build_fleet
from dynamo_planner.step_model import coefficients, learn_step
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.planner_fakes import FakeEngine, FakeProxy, bench, child_command, served, vllm_text


def pools(**own: dict[str, Any]) -> dict[str, Any]:
    return {"proxy_admin": "http://127.0.0.1:9", "pools": own}


@pytest.mark.parametrize(
    ("given_settings", "says"),
    [
        (pools(a={"engine": ["http://e:1"]}, b={"engine": ["http://e:1"]}), "both have http://e:1"),
        (pools(a={"proxy_admin": "http://p:1"}), "belongs to all pools"),
        (pools(a={"min_replicas": 9, "max_replicas": 2}), "pools.a: min_replicas 9 is above"),
        (pools(a={"min_replica": 9}), "pools.a: unknown key 'min_replica'"),
        ({**pools(a={"min_replicas": 3}, b={"min_replicas": 3}), "max_gpus": 5}, "take 6 GPUs but max_gpus is 5"),
        ({**pools(a={}), "advisory": False}, "pools.a: no-advisory needs engine_command"),
    ],
)
def test_pools_that_contradict_are_refused(given_settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PlannerConfig.model_validate(given_settings).by_pool()
    assert says in str(caught.value)


def test_the_readme_example_is_a_configuration(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "planner_sidecar" / "README.md"
    example = page.read_text().partition("    proxy-admin:")[2].partition("\n\n")[0]
    (tmp_path / "planner.yaml").write_text("proxy-admin:" + example.replace("\n    ", "\n"))
    found = load_config(tmp_path / "planner.yaml", {}).by_pool()
    assert {name: pool.policy().role for name, pool in found.items()} == {"prefill": "prefill", "decode": "decode"}
    assert found["decode"].gpus_per_replica == 2


BASE = ["--engine", "http://127.0.0.1:9"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*BASE, "--max-gpus", "2", "--min-replicas", "3"], "min_replicas take 3 GPUs but max_gpus is 2"),
        ([*BASE, "--scale-to-zero-seconds", "60"], "needs proxy_admin"),
        ([*BASE, "--no-advisory", "--kubernetes", "vllm"], "deployment/NAME"),
        ([*BASE, "--no-advisory", "--kubernetes", "deployment/a", "--scale-command", "true"], "two ways to scale"),
        ([*BASE, "--no-advisory", "--kubernetes", "deployment/a", "--kubeconfig", "/nope"], "--kubeconfig"),
        ([*BASE, "--profile", "/nope"], "--profile"),
        ([*BASE, "--memory-file", "/nope/memory"], "--memory-file"),
    ],
)
def test_new_mistakes_are_one_line_too(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["--port", "0", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err


def test_two_pools_share_the_budget_and_the_log_replays(tmp_path: Path) -> None:
    async def story() -> None:
        prefill, decode = FakeEngine(vllm_text(waiting=90, running=9)), FakeEngine(vllm_text(waiting=90, running=9))
        async with served(prefill.app()) as one, served(decode.app()) as two, served(FakeProxy().app()) as admin:
            settings = {
                "proxy_admin": admin,
                "max_gpus": 8,
                "pools": {"prefill": {"engine": [one]}, "decode": {"engine": [two]}},
            }
            async with bench(tmp_path, **settings) as stand:
                done = await stand.fleet.tick()
                wanted = {name: decision.desired for name, (decision, _) in done.items()}
                assert sum(wanted.values()) == 8
                assert {decision.need_up for decision, _ in done.values()} == {11}
                assert all(decision.inputs.ceiling == wanted[name] for name, (decision, _) in done.items())
                metrics = stand.planner.parts.metrics
                assert metrics.value("dynamo_planner_desired_replicas", pool="decode") == wanted["decode"]
        report = replay((tmp_path / "decisions.jsonl").read_text().splitlines())
        assert (report.decisions, report.differences) == (2, ())

    asyncio.run(story())


RECORDER = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1]); seen = json.loads(path.read_text()) if path.exists() else []
path.write_text(json.dumps(seen + [sys.argv[2:]]))
sys.exit("no such partition" if "fail" in sys.argv[1] else 0)
"""


def hook(folder: Path, record: str) -> str:
    script = folder / "recorder.py"
    script.write_text(RECORDER)
    return f"{sys.executable} -S -E {script} {folder / record} {{replicas}} {{victims}}"


def test_the_hook_gets_the_count_and_drained_victims(tmp_path: Path) -> None:
    async def story() -> None:
        engine = FakeEngine(vllm_text(running=0, kv=0.0))
        dead = "http://127.0.0.1:9"
        async with served(engine.app()) as url:
            proxy = FakeProxy(states={url: "ready", dead: "ready"}, in_flight={url: 2, dead: 1})
            async with served(proxy.app()) as admin:
                settings = {"advisory": False, "scale_command": hook(tmp_path, "calls"), "proxy_admin": admin}
                # Nobody can read the dead one's leases: half of the drain is waited for them.
                async with bench(tmp_path, drain_seconds=12, **settings) as stand:
                    await stand.planner.order(3)
                    _, outcome = await stand.planner.order(1)
                    assert outcome.reason == "draining"
                    await stand.eventually(lambda: proxy.states[dead] == "draining")
                    assert json.loads((tmp_path / "calls").read_text()) == [["3", ""]]
                    proxy.in_flight[dead] = 0
                    await stand.until(f"stopped {dead}")
                    assert json.loads((tmp_path / "calls").read_text()) == [["3", ""], ["1", dead]]
                    assert proxy.states == {url: "ready"}

    asyncio.run(story())


def test_a_hook_that_fails_leaves_the_victims_serving(tmp_path: Path) -> None:
    async def story() -> None:
        engine, other = FakeEngine(), FakeEngine()
        async with served(engine.app()) as one, served(other.app()) as two:
            proxy = FakeProxy(states={one: "ready", two: "ready"})
            async with served(proxy.app()) as admin:
                settings = {"advisory": False, "scale_command": hook(tmp_path, "fail"), "proxy_admin": admin}
                async with bench(tmp_path, **settings) as stand:
                    _, outcome = await stand.planner.order(3)
                    assert (outcome.accepted, outcome.reason) == (False, "command_failed")
                    assert "no such partition" in outcome.actions[0]
                    await stand.planner.order(1)
                    assert "(command_failed)" in await stand.until("kept http")
                    assert set(proxy.states.values()) == {"ready"}
                settings["scale_command"] = "true"
                async with bench(tmp_path, **settings) as stand:
                    stand.planner.parts.actuator._command = "no-such-program"  # type: ignore[attr-defined]
                    assert (await stand.planner.order(3))[1].reason == "cannot_start"

    asyncio.run(story())


SLEEPY = SizingPolicy(idle_to_zero_seconds=100.0, stabilisation_seconds=10.0)


def idle(now: float, engines: int, proxy: ProxyObservation) -> FleetObservation:
    names = (EngineObservation(f"http://e{number}", "ready", running=0, waiting=0, kv_usage=0.0, interval_seconds=10,
                               ttft=Delta(0, 0)) for number in range(engines))  # fmt: skip
    return FleetObservation(now, tuple(names), proxy)


def test_an_idle_pool_sleeps_and_the_first_request_wakes_it() -> None:
    quiet, memory, told = ProxyObservation(interval_seconds=10, arrivals=0, prompt_tokens=0), Memory(), []
    for tick in range(14):
        decision = decide(DecisionInputs(idle(10.0 * tick, 1, quiet), SLEEPY, memory))
        memory = decision.memory
        told.append((decision.desired, decision.reason))
    assert told[:10] == [(1, "steady")] * 10
    assert told[10] == (0, "idle_to_zero")
    asleep = decide(DecisionInputs(idle(200.0, 0, quiet), SLEEPY, memory))
    assert (asleep.desired, asleep.reason) == (0, "asleep")
    gone = decide(DecisionInputs(idle(210.0, 0, ProxyObservation(stale_reason="timeout")), SLEEPY, asleep.memory))
    assert (gone.desired, gone.reason) == (0, "asleep")
    asked = ProxyObservation(interval_seconds=10, arrivals=1, prompt_tokens=9)
    woken = decide(DecisionInputs(idle(220.0, 0, asked), SLEEPY, gone.memory))
    assert (woken.desired, woken.reason) == (1, "wake")


@pytest.mark.parametrize(
    "busy",
    [
        ProxyObservation(interval_seconds=10, arrivals=1, prompt_tokens=1),
        ProxyObservation(interval_seconds=10, arrivals=0, prompt_tokens=0, in_flight=1),
        ProxyObservation(stale_reason="timeout"),
    ],
)
def test_a_pool_that_is_asked_or_cannot_be_read_stays_awake(busy: ProxyObservation) -> None:
    memory = Memory()
    for tick in range(30):
        decision = decide(DecisionInputs(idle(10.0 * tick, 1, busy), SLEEPY, memory))
        memory = decision.memory
        assert decision.desired == 1


SLA = SizingPolicy(target="sla", max_replicas=20, ttft_seconds=0.5, stabilisation_seconds=100.0, down_period_seconds=0)


def ticks(memory: Memory, count: int, rate: float, replicas: int, start: float) -> list[tuple[int, str, Memory]]:
    """A pool that follows its planner at once."""
    told = []
    for tick in range(count):
        now = start + 10.0 * tick
        engines = tuple(
            EngineObservation(f"http://e{number}", "ready", age_seconds=999, running=1, waiting=0, kv_usage=0.2,
                              interval_seconds=10, ttft=Delta(0.05 * rate * 10 / replicas, rate * 10 / replicas, None),
                              prompt_tokens=1000 * rate * 10 / replicas)
            for number in range(replicas)
        )  # fmt: skip
        proxy = ProxyObservation(interval_seconds=10, arrivals=rate * 10, prompt_tokens=1000 * rate * 10)
        seen = FleetObservation(now, engines, proxy, wall_seconds=now)
        decision = decide(DecisionInputs(seen, SLA, memory))
        memory, replicas = decision.memory, decision.desired
        told.append((replicas, decision.reason, memory))
    return told


@cache
def steady() -> list[tuple[int, str, Memory]]:
    return ticks(Memory(), 60, 40.0, 6, 0.0)


@settings(max_examples=20)
@given(killed_at=st.integers(1, 59), after=st.sampled_from([5.0, 40.0, 90.0]))
def test_killed_at_any_tick_the_next_one_decides_the_same_or_safer(killed_at: int, after: float) -> None:
    """Steady at 40/s, then another load; the heir takes over the memory file's contents at one tick."""
    replicas, _, memory = steady()[killed_at - 1]
    lived = ticks(memory, 20, after, replicas, 10.0 * killed_at)
    heir = ticks(resumed(memory, 10.0 * killed_at), 20, after, replicas, 10.0 * killed_at)
    for (now_lived, _, _), (now_heir, _, _) in zip(lived, heir, strict=True):
        assert now_heir >= now_lived, "the heir gave something up that its forerunner had kept"
    counts = [count for count, _, _ in heir]
    turns = sum((b - a) * (d - c) < 0 for a, b, c, d in zip(counts, counts[1:], counts[1:], counts[2:], strict=False))
    assert turns <= 1, f"it thrashes: {counts}"


def test_without_any_memory_nothing_is_given_up_for_a_whole_window() -> None:
    told = ticks(Memory(), 12, 1.0, 6, 0.0)
    assert [count for count, _, _ in told[:10]] == [6] * 10


def test_the_memory_file_survives_what_happens_to_files(tmp_path: Path) -> None:
    file, taught = MemoryFile(tmp_path / "memory"), Memory()
    for number in range(20):
        taught = replace(taught, prefill=learn_step(taught.prefill, (1.0, 100.0 * number), 0.02 + 1e-4 * number))
    assert file.load(5.0, 1000.0)[0] == {}
    file.save({"default": replace(taught, since_seconds=1.0, needs=((1.0, 2),), startups=(33.0,))}, 1000.0)
    back, said = file.load(5.0, 1060.0)
    assert "60 s old" in said
    assert back["default"].prefill == taught.prefill
    assert (back["default"].needs, back["default"].since_seconds, back["default"].startups) == ((), None, (33.0,))
    assert file.load(5.0, 1e9)[0] == {}, "a memory of another year"
    assert file.load(5.0, 10.0)[0] == {}, "a memory from the future"
    (tmp_path / "memory").write_text('{"wall_seconds": 1000, "pools": {"default": {"correction": "x"}}}')
    assert file.load(5.0, 1001.0)[0] == {}
    (tmp_path / "memory").write_bytes(b"\xff\x00")
    assert "cannot be read" in file.load(5.0, 1001.0)[1]
    MemoryFile(tmp_path).save({}, 0.0)  # a folder is no file: counted, not raised


def test_a_planner_goes_on_from_its_memory_file(tmp_path: Path) -> None:
    async def story() -> None:
        engine = FakeEngine()
        async with served(engine.app()) as url:
            for scale in (1.0, 2.0):
                async with bench(tmp_path, engine=(url,), memory_file=tmp_path / "memory") as stand:
                    stand.fleet.resume()
                    engine.text = vllm_text(scale=scale)
                    await stand.fleet.tick()
                    engine.text = vllm_text(scale=scale + 5)
                    await stand.fleet.tick()
                    weight = stand.planner.memory.forecast.filled_seconds + len(stand.planner.memory.forecast.pending)
                    assert weight > 0
            assert any("goes on from" in line for line in stand.said)

    asyncio.run(story())


def test_the_budget_counts_what_is_ordered_or_draining() -> None:
    drains = EngineObservation("http://d", "draining")
    ready = EngineObservation("http://a", "ready", running=9, waiting=90, kv_usage=0.2)
    inputs = DecisionInputs(FleetObservation(0.0, (ready, drains), ordered=4), SizingPolicy(), Memory())
    assert wish(inputs).current == 4
    assert decide(replace(inputs, ceiling=4)).desired == 1, "three more GPUs are spoken for"
    assert decide(replace(inputs, ceiling=6)).desired == 3


def test_a_profile_gives_a_first_answer(tmp_path: Path) -> None:
    profile = Profile(
        prefill=tuple((float(n), 0.02 + 2e-5 * n) for n in (128, 512, 2048, 8192)),
        decode=tuple((float(b), b / 100, 0.01 + 1e-3 * b) for b in (1, 4, 16, 64)),
    )
    write_profile(tmp_path / "p.json", profile)
    assert read_profile(tmp_path / "p.json") == profile
    prefill, decode = map(coefficients, models(profile))
    assert prefill == pytest.approx((0.02, 2e-5), rel=0.05)
    assert decode is not None
    for content in ("{}", "[]", '{"prefill": [[1]], "decode": []}', "x"):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(ConfigError, match="dynamo-planner profile"):
            read_profile(tmp_path / "bad")


def test_the_page_is_whole_and_escaped() -> None:
    sights = [
        Sight(60.0 * n, 10.0 + n, 8.0 + n, 12.0 + n, 16.0 + n, 90.0, 2 + n // 5, 3 + n // 5, 0.9 + n / 1000)
        for n in range(30)
    ]
    decision = {"at": "now", "pool": "<b>", "current": 1, "desired": 2, "reason": "ttft", "explanation": "<script>"}
    text = render_page({"prefill": sights, "decode": [], "blind": [replace(s, rate=None, upper=None, attained=None)
                        for s in sights]}, [decision], "advisory")  # fmt: skip
    assert text.count("<svg") == text.count("</svg>") == 5
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "nan" not in text
    assert "SLO attainment" in text
    from xml.etree import ElementTree

    for drawing in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + drawing.partition("</svg>")[0] + "</svg>")


def test_the_control_port_serves_the_page_and_orders_by_pool(tmp_path: Path) -> None:
    async def story() -> None:
        engine = FakeEngine()
        async with served(engine.app()) as url, served(FakeProxy().app()) as admin:
            settings = {
                "proxy_admin": admin,
                "advisory": False,
                "pools": {
                    "watched": {"engine": [url], "engine_command": child_command(tmp_path)},
                },
            }
            async with bench(tmp_path, **settings) as stand:
                port = ControlPort(stand.fleet, 60.0, stand.planner.parts.clock)
                base = f"http://127.0.0.1:{await port.start('127.0.0.1', 0)}"
                try:
                    await stand.fleet.tick()
                    await stand.fleet.tick()
                    async with stand.session.get(base + "/") as answer:
                        assert answer.headers["Content-Type"].startswith("text/html")
                        assert "Pool watched" in await answer.text()
                    async with stand.session.post(base + "/scale", json={"replicas": 1}) as answer:
                        assert answer.status == 404
                    async with stand.session.post(base + "/scale", json={"replicas": 1, "pool": "watched"}) as answer:
                        assert answer.status == 200
                finally:
                    await port.close()

    asyncio.run(story())


def test_one_pool_that_cannot_close_does_not_keep_the_others(tmp_path: Path) -> None:
    async def story() -> None:
        async with aiohttp.ClientSession() as session:
            config = PlannerConfig.model_validate({"proxy_admin": "http://127.0.0.1:9", "pools": {"a": {}, "b": {}}})
            fleet = build_fleet(config, session, DecisionLog(None), lambda text: None)
            closed: list[str] = []

            async def broken(self: Planner) -> None:
                closed.append(self.pool)
                raise RuntimeError("a bug")

            for planner in fleet.planners.values():
                planner.close = broken.__get__(planner)  # type: ignore[method-assign]
            with pytest.raises(RuntimeError):
                await fleet.close()
            assert closed == ["a", "b"]
            assert isinstance(fleet, Fleet)

    asyncio.run(story())
