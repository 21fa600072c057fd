"""Dynamo's replay as judge, and every policy by its name, each run in a process of its own."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynamo_planner.profile_file import Profile

from benchmarks.replay.policies import KV_TOKENS, STARTUP_SECONDS, Aim, Planned, Scheduled, hindsight, oracle

TTFT_MS, ITL_MS = 500.0, 50.0
CONTEXT_TOKENS = 16_384
EASY = {"throughput": "throughput", "latency": "latency"}
LOAD_THRESHOLDS = {  # half a batch of prompts, and KV use between what `throughput` and `latency` have built in
    "prefill_scale_up_queue_tokens": 4096,
    "prefill_scale_down_queue_tokens": 410,
    "decode_scale_up_kv_rate": 70.0,
    "decode_scale_down_kv_rate": 35.0,
}
KEPT = (
    "goodput_completed_requests",
    "num_requests",
    "gpu_hours",
    "median_ttft_ms",
    "p99_ttft_ms",
    "p99_tpot_ms",
)


class Watched:
    """Any policy, telling at every tick how far the replay has come: an overloaded one may never end."""

    def __init__(self, policy: Any, tell: Callable[[dict[str, Any]], None]) -> None:
        self._policy = policy
        self._tell = tell
        self._now = 0.0

    def initial_tick_ms(self) -> float:
        self._now = float(self._policy.initial_tick_ms())
        return self._now

    def on_tick(self, seen: dict[str, Any]) -> dict[str, Any]:
        waiting = {step["worker_id"]: step["num_queued_prefill"] for step in seen.get("prefill_fpm_snapshots", [])}
        counts = {role: int(seen[f"active_{role}_count"]) for role in ("prefill", "decode")}
        self._tell({"at_seconds": self._now / 1e3, **counts, "waiting": sum(waiting.values())})
        answer: dict[str, Any] = self._policy.on_tick(seen)
        if answer.get("next_tick_ms") is not None:
            self._now = float(answer["next_tick_ms"])
        return answer


class Judge:
    """Dynamo's replay with one engine model."""

    def __init__(
        self, trace: Path, start: tuple[int, int], tell: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> None:
        self._tell = tell
        self._start = start
        import dynamo.planner
        from dynamo.mocker.args import resolve_planner_profile_data

        self.trace = trace
        with trace.open() as lines:
            last = max(json.loads(line)["timestamp"] for line in lines)
        self.end_ms = last + 300_000.0  # what is not served five minutes after the last arrival is not served in time
        folder = Path(next(iter(dynamo.planner.__path__)))
        self.profile = folder / "tests" / "data" / "profiling_results" / "H200_TP1P_TP1D"
        self._steps = resolve_planner_profile_data(self.profile)

    def engine(self, role: str) -> Any:
        from dynamo.mocker import MockEngineArgs

        return MockEngineArgs(
            worker_type=role,
            planner_profile_data=str(self._steps.npz_path),
            block_size=64,
            num_gpu_blocks=14_000,
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            max_model_len=CONTEXT_TOKENS,  # without it Dynamo's throughput and latency modes never scale prefill
            startup_time=STARTUP_SECONDS,
            enable_prefix_caching=False,
        )

    def planner_profile(self) -> Profile:
        """The measured points as `dynamo-planner profile` would write them."""
        from dynamo.planner.monitoring.perf_metrics import _convert_decode_profiling, _convert_prefill_profiling

        prefill = [(step.scheduled_requests, step.wall_time) for step in _convert_prefill_profiling(str(self.profile))]
        decode = [(step.scheduled_requests, step.wall_time) for step in _convert_decode_profiling(str(self.profile))]
        return Profile(
            tuple((float(done.sum_prefill_tokens), seconds) for done, seconds in prefill),
            tuple(
                (float(done.num_decode_requests), done.sum_decode_kv_tokens / KV_TOKENS, seconds)
                for done, seconds in decode
            ),
        )

    def run(self, policy: Any, start: tuple[int, int] | None = None) -> dict[str, Any]:
        from dynamo.replay import api

        prefill, decode = start or self._start
        report = api._run_mocker_trace_replay(
            api._normalize_trace_files(str(self.trace)),
            prefill_engine_args=self.engine("prefill"),
            decode_engine_args=self.engine("decode"),
            num_prefill_workers=prefill,
            num_decode_workers=decode,
            router_mode="round_robin",
            trace_block_size=512,
            trace_format="mooncake",
            sla_ttft_ms=TTFT_MS,
            sla_itl_ms=ITL_MS,
            max_sim_time_ms=self.end_ms,
            scaling_policy=Watched(policy, self._tell),
        )
        return json.loads(report) if isinstance(report, str) else dict(report)

    def run_dynamo(self, **settings: Any) -> dict[str, Any]:
        from dynamo.planner.config.planner_config import PlannerConfig
        from dynamo.planner.core.types import WorkerCapabilities
        from dynamo.planner.monitoring.perf_metrics import _convert_decode_profiling, _convert_prefill_profiling
        from dynamo.planner.offline.replay_adapter import create_replay_planner_adapter
        from dynamo.replay.main import _engine_caps

        config = PlannerConfig(
            mode="disagg",
            backend="vllm",
            max_gpu_budget=64,
            prefill_engine_num_gpu=1,
            decode_engine_num_gpu=1,
            report_interval_hours=None,
            live_dashboard_port=0,
            ttft_ms=TTFT_MS,
            itl_ms=ITL_MS,
            profile_results_dir=str(self.profile),
            **settings,
        )
        config.advisory = True
        able = WorkerCapabilities(
            prefill=_engine_caps(self.engine("prefill")), decode=_engine_caps(self.engine("decode"))
        )
        adapter = create_replay_planner_adapter(planner_config=config, capabilities=able)
        if not adapter._is_easy_mode():
            adapter.install_benchmark_fpms(
                prefill_fpms=_convert_prefill_profiling(str(self.profile)),
                decode_fpms=_convert_decode_profiling(str(self.profile)),
            )
        with adapter:
            return self.run(adapter)


def run_policy(judge: Judge, name: str, aim: Aim, lent: dict[str, Planned]) -> dict[str, Any]:
    """One policy by its name; see --policies."""
    if name.startswith("planner"):  # or planner-P-D: never fewer than these
        _, prefill, decode = name.split("-") if "-" in name else ("", "1", "1")
        least = int(prefill), int(decode)
        lent["planner"] = Planned(judge.planner_profile(), aim, least)
        return judge.run(lent["planner"])
    if name == "oracle":
        return judge.run(oracle(judge.trace, lent["planner"], aim))
    if name.startswith("hindsight"):  # hindsight-ROOM
        return judge.run(hindsight(judge.trace, lent["planner"], aim, float(name.partition("-")[2] or 1.0)))
    if name.startswith("static"):
        _, prefill, decode = name.split("-")
        return judge.run(Scheduled([(0.0, int(prefill), int(decode))]), (int(prefill), int(decode)))
    if name in EASY:
        return judge.run_dynamo(optimization_target=EASY[name])
    if name == "load":
        return judge.run_dynamo(optimization_target="load", **LOAD_THRESHOLDS)
    kind, _, predictor = name.partition("-")
    return judge.run_dynamo(
        optimization_target="sla",
        enable_load_scaling=kind in ("sla_load", "sla_both"),
        enable_throughput_scaling=kind in ("sla", "sla_both"),
        **({"load_predictor": predictor} if predictor else {}),
    )


def _run_in_child(pipe: Any, trace: Path, names: list[str], aim: Aim, start: tuple[int, int]) -> None:
    """One policy, or the planner and the oracle that borrows its step times; one report each."""
    lent: dict[str, Planned] = {}
    for name in names:
        began = time.monotonic()
        try:
            seen = run_policy(Judge(trace, start, pipe.send), name, aim, lent)
            kept = {key: seen[key] for key in KEPT} | {"seconds": round(time.monotonic() - began)}
            pipe.send(kept | ({"log": lent["planner"].log} if name.startswith("planner") else {}))
        except Exception as error:  # noqa: BLE001 - one mode that does not run must not end the others
            pipe.send({"failed": f"{type(error).__name__}: {str(error)[:200]}"})


def judged(trace: Path, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run in a process of its own, which is ended when it takes too long."""
    aim = Aim(TTFT_MS / 1e3, ITL_MS / 1e3, options.attainment, options.burst_factor, options.window_seconds)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_run_in_child, args=(theirs, trace, names, aim, options.start), daemon=True)
    child.start()
    theirs.close()
    reports: list[dict[str, Any]] = []
    end, last = time.monotonic() + options.limit_seconds, {}
    try:
        while len(reports) < len(names):
            if not ours.poll(max(0.0, end - time.monotonic())):
                reports.append({"failed": f"not finished in {options.limit_seconds:g} s; {_how_far(last)}"})
                break
            heard = ours.recv()
            if "at_seconds" in heard:
                last = heard
                continue
            reports.append(heard)
            end = time.monotonic() + options.limit_seconds
    except EOFError:
        reports.append({"failed": "its process died"})
    finally:
        child.kill()
        child.join()
    return reports + [{"failed": "not begun"}] * (len(names) - len(reports))


def _how_far(last: dict[str, Any]) -> str:
    if not last:
        return "no tick was seen"
    workers = f"{last['prefill']} prefill and {last['decode']} decode workers"
    return f"at {last['at_seconds']:.0f} s of the stream with {workers}, {last['waiting']} prompts waiting"
