"""The planner and Dynamo's own modes in Dynamo's own simulator, on the same streams.

    PYTHON_WITH_AI_DYNAMO -m benchmarks.replay --traces FOLDER [--shapes burst,m-large] [--policies planner,oracle,...]

Needs ai-dynamo 1.4.2 in an environment of its own (`pip install ai-dynamo==1.4.2`), run from the repository's root. The
judge is its offline replay: vLLM scheduler model, step times measured on an H200 (Llama-3.1-8B FP8), round-robin
routing, start-up 90 s, starting with 3 prefill and 3 decode workers. Goodput counts requests within both targets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "planner_sidecar"))
os.environ.setdefault("DYN_LOG", "error")

from dynamo_planner.profile_file import Profile  # noqa: E402

from benchmarks.replay.policies import KV_TOKENS, STARTUP_SECONDS, Planned, Scheduled, oracle  # noqa: E402
from benchmarks.replay.shapes import SHAPES, write_trace  # noqa: E402

TTFT_MS, ITL_MS, START = 500.0, 50.0, (3, 3)
EASY = {"throughput": "throughput", "latency": "latency"}
PREDICTORS = ("constant", "arima", "kalman", "prophet")


class Judge:
    """Dynamo's replay with one engine model."""

    def __init__(self, trace: Path) -> None:
        import dynamo.planner
        from dynamo.mocker.args import resolve_planner_profile_data

        self.trace = trace
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

    def run(self, policy: Any, start: tuple[int, int] = START) -> dict[str, Any]:
        from dynamo.replay import api

        report = api._run_mocker_trace_replay(
            api._normalize_trace_files(str(self.trace)),
            prefill_engine_args=self.engine("prefill"),
            decode_engine_args=self.engine("decode"),
            num_prefill_workers=start[0],
            num_decode_workers=start[1],
            router_mode="round_robin",
            trace_block_size=512,
            trace_format="mooncake",
            sla_ttft_ms=TTFT_MS,
            sla_itl_ms=ITL_MS,
            scaling_policy=policy,
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


def run_policy(judge: Judge, name: str, attainment: float, lent: dict[str, Planned]) -> dict[str, Any]:
    """One policy by its name; see --policies."""
    targets = TTFT_MS / 1e3, ITL_MS / 1e3
    if name == "planner":
        lent["planner"] = Planned(judge.planner_profile(), *targets, attainment)
        return judge.run(lent["planner"])
    if name == "oracle":
        plan = oracle(judge.trace, lent["planner"], *targets, attainment)
        return judge.run(plan)
    if name.startswith("static"):
        _, prefill, decode = name.split("-")
        return judge.run(Scheduled([(0.0, int(prefill), int(decode))]), (int(prefill), int(decode)))
    if name in EASY:
        return judge.run_dynamo(optimization_target=EASY[name])
    if name == "load":
        return judge.run_dynamo(optimization_target="load")
    kind, _, predictor = name.partition("-")
    return judge.run_dynamo(
        optimization_target="sla",
        enable_load_scaling=kind in ("sla_load", "sla_both"),
        enable_throughput_scaling=kind in ("sla", "sla_both"),
        **({"load_predictor": predictor} if predictor else {}),
    )


DEFAULT = "planner,oracle,throughput,latency,load,sla-constant,sla-arima,sla-kalman,sla_load"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="folder with servegen_* and azure2023_conv.csv")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--policies", default=DEFAULT, help="also static-P-D, sla-prophet, sla_both-constant")
    parser.add_argument("--attainment", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        import dynamo.replay  # noqa: F401
    except ImportError:
        print(
            "benchmarks.replay: ai-dynamo 1.4.2 is not in this environment; see the head of the file", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes.split(","):
            trace, lent = Path(folder, f"{shape}.jsonl"), {}
            count = write_trace(trace, shape, options.traces, options.seed)
            print(f"== {shape}: {count} requests, seed {options.seed}", flush=True)
            for name in options.policies.split(","):
                began = time.monotonic()
                try:
                    seen = run_policy(Judge(trace), name, options.attainment, lent)
                except Exception as error:  # noqa: BLE001 - one mode that does not run must not end the others
                    print(f"{name:14} did not run: {type(error).__name__}: {str(error)[:200]}", flush=True)
                    continue
                share = seen["goodput_completed_requests"] / seen["num_requests"]
                print(
                    f"{name:14} goodput {share:6.1%}  GPU-h {seen['gpu_hours']:6.2f}  "
                    f"TTFT p50/p99 {seen['median_ttft_ms']:.0f}/{seen['p99_ttft_ms']:.0f} ms  "
                    f"TPOT p99 {seen['p99_tpot_ms']:.1f} ms  [{time.monotonic() - began:.0f} s]",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
