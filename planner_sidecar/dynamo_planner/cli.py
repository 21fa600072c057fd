"""The command line of `dynamo-planner`: flags in, one configuration out, every mistake one line and exit
code 2.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError, PlannerError

if TYPE_CHECKING:
    from .profile_engine import ProfilePlan
    from .profile_file import Profile

# Name, type and help of every flag. Defaults live in PlannerConfig alone, so that flags can win over the
# file.
_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("--config", Path, "YAML file; its keys are the flags' names."),
    ("--engine", list[str], "URL of an engine to watch; repeat for more."),
    ("--proxy-admin", str, "Admin URL of dynamo-proxy: arrivals, drains and registrations."),
    ("--advisory/--no-advisory", bool, "Only say what to do (default), or start and stop replicas."),
    ("--optimization-target", Literal["load", "sla"], "load (default): KV use and queue. sla: TTFT and ITL."),
    ("--target-ttft-ms", float, "Time to first token to hold, for sla."),
    ("--target-itl-ms", float, "Inter-token latency to hold, for sla."),
    ("--burst-factor", float, "Keep room for a step to so many times the usual load (default 1: none)."),
    ("--target-attainment", float, "Share of requests that must be within the targets (default 0.95)."),
    ("--role", Literal["aggregated", "prefill", "decode"], "What the engines do (default aggregated)."),
    ("--max-gpus", int, "GPU budget of all pools together (default: none)."),
    ("--gpus-per-replica", int, "GPUs that a replica holds (default 1)."),
    ("--min-replicas", int, "Never fewer (default 1)."),
    ("--max-replicas", int, "Never more (default 8)."),
    ("--max-kv-usage", float, "KV use per replica that asks for another one, 0..1 (default 0.8)."),
    ("--max-waiting-per-replica", float, "Queued requests per replica that ask for more (default 4)."),
    (
        "--max-running-per-replica",
        float,
        "Running requests per replica that ask for more (default: no limit).",
    ),
    ("--interval-seconds", float, "Time between two looks (default 10)."),
    ("--stabilisation-seconds", float, "How long fewer must suffice before one is stopped (default 300)."),
    ("--startup-seconds", float, "How long a replica takes to be ready, until that was seen (default 60)."),
    (
        "--scale-to-zero-seconds",
        float,
        "Stop all after so long without a request (default: never).",
    ),
    ("--profile", Path, "Step times measured by 'dynamo-planner profile', to begin with."),
    ("--memory-file", Path, "Keep what was learnt here, over restarts."),
    (
        "--kubernetes",
        str,
        "deployment/NAME, statefulset/NAME, leaderworkerset/NAME, PLURAL.VERSION.GROUP/NAME.",
    ),
    ("--kubernetes-namespace", str, "Its namespace (default: the pod's own, or the kubeconfig's)."),
    ("--kubeconfig", Path, "Reach the cluster from outside."),
    ("--lease-name", str, "Lease that keeps a second planner from writing (default dynamo-planner)."),
    ("--pod-port", int, "Port of the engine in its pod (default 8000)."),
    ("--pending-seconds", float, "A pod unready for longer no longer counts (default 600)."),
    ("--scale-command", str, "Scale by a command of your own: 'my-scaler --count {replicas} --stop {victims}'."),
    ("--decision-log", Path, "Append every decision with its inputs to this file, as JSON lines."),
    ("--host", str, "Address of the planner's own port (default 127.0.0.1)."),
    ("--port", int, "Own port: /metrics, /health, /decisions, /scale (default 8790; 0 takes a free one)."),
    ("--engine-command", str, "How to start a replica: 'vllm serve MODEL --port {port}'."),
    ("--engine-port-range", str, "Ports for started replicas (default 8100-8199)."),
    ("--engine-gpus", str, "GPUs for started replicas, as 0-7 or 0,1,4; each gets --gpus-per-replica of its own."),
    ("--engine-log-dir", Path, "Where started replicas write their output, and are found again."),
    (
        "--keep-replicas/--stop-replicas",
        bool,
        "On exit leave started replicas running, or stop them (default).",
    ),
    ("--start-seconds", float, "How long a replica may take to become healthy (default 600)."),
    ("--drain-seconds", float, "How long a drain may take before it is undone (default 300)."),
    ("--exit-drain-seconds", float, "How long drains may take when the planner exits (default 30)."),
    ("--terminate-seconds", float, "Time between SIGTERM and SIGKILL (default 60)."),
    ("--replay", Path, "Make the decisions of this log again, compare, and exit."),
)


_PROFILE_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("--engine", str, "URL of the engine; it should have nothing else to do."),
    ("--out", Path, "Where to write the profile (default profile.json); the plots go beside it as .html."),
    ("--prompt-tokens", str, "Prompt lengths to measure (default 128,512,2048,8192)."),
    ("--batches", str, "Batches to measure (default 1,4,16,64)."),
    ("--output-tokens", int, "Tokens per answer while decoding is measured (default 64)."),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    import typer

    given = list(sys.argv[1:] if arguments is None else arguments)
    # Plain help: rich's tables cut the names of flags at 80 columns.
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    program = "dynamo-planner"
    if given[:1] == ["profile"]:
        arguments, program = given[1:], "dynamo-planner profile"
        app.command(help=_PROFILE_HELP)(_command(_PROFILE_FLAGS, _profile))
    else:
        app.command(help=_HELP, epilog=_EPILOG)(_command(_FLAGS, _run))
    # typer carries its own copy of click since 0.29 and imports click before; the class is the same by name.
    mistake: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        code = app(args=arguments, prog_name=program, standalone_mode=False)
    except (PlannerError, mistake) as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        sys.stderr.write(f"dynamo-planner: {' '.join(text.split())}\n")
        return 2
    except KeyboardInterrupt:  # before the planner's own signal handlers stand
        return 130
    return int(code or 0)


_PROFILE_HELP = "Measure one idle engine and write its step times to a file that --profile reads, with plots beside it."
_EPILOG = "Step times of one idle engine: dynamo-planner profile --engine URL (flags: dynamo-planner profile --help)"
_HELP = "Size a fleet of vLLM or SGLang replicas from what they publish; advise, or start and drain-stop them."


def _command(flags_table: Sequence[tuple[str, Any, str]], run: Callable[[dict[str, Any]], int]) -> Any:
    """A function whose signature is the table of flags; typer reads nothing else."""
    import typer

    def command(**flags: Any) -> int:
        return run(flags)

    parameters = []
    for names, kind, text in flags_table:
        option = typer.Option(None, names, help=text, show_default=False)
        name = names.partition("/")[0].lstrip("-").replace("-", "_")
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=_maybe(kind))
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _maybe(kind: Any) -> Any:
    return kind | None


def _run(flags: dict[str, Any]) -> int:
    path, log_path = flags.pop("config"), flags.pop("replay")
    if log_path is not None:
        return _replay(log_path)
    from .config import load_config

    config = load_config(path, flags)
    import asyncio

    from .service import serve

    asyncio.run(serve(config, _say))
    return 0


def _profile(flags: dict[str, Any]) -> int:
    import asyncio

    from .page import render_profile
    from .profile_engine import ProfilePlan
    from .profile_file import write_profile

    if flags["engine"] is None:
        raise ConfigError("profile needs the engine to measure; give --engine URL")
    url, out = flags["engine"].rstrip("/"), flags["out"] or Path("profile.json")
    given = {
        "prompt_tokens": _numbers("--prompt-tokens", flags["prompt_tokens"]),
        "batches": _numbers("--batches", flags["batches"]),
        "output_tokens": flags["output_tokens"],
    }
    plan = ProfilePlan(**{name: value for name, value in given.items() if value is not None})
    if plan.output_tokens < 2:
        raise ConfigError("--output-tokens must be 2 at least: gaps between tokens are measured")
    profile = asyncio.run(_measured(url, plan))
    write_profile(out, profile)
    out.with_suffix(".html").write_text(render_profile(profile, url), encoding="utf-8")
    _say(f"written: {out}, plots in {out.with_suffix('.html')}")
    return 0


async def _measured(url: str, plan: ProfilePlan) -> Profile:
    import aiohttp

    from .profile_engine import EngineProfiler

    async with aiohttp.ClientSession() as session:
        return await EngineProfiler(session, url, plan).run(_say)


def _numbers(flag: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{flag} {text!r} is no list of counts; write it as 128,512")
    return tuple(int(part) for part in parts)


def _replay(path: Path) -> int:
    from .decision_log import replay

    try:
        with path.open(encoding="utf-8") as lines:
            report = replay(lines)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the path given to --replay") from error
    for difference in report.differences:
        sys.stdout.write(difference + "\n")
    sys.stdout.write(f"{report.decisions} decisions made again, {len(report.differences)} differ\n")
    return 1 if report.differences else 0


def _say(text: str) -> None:
    """One console line; a console that is gone must not stop the planner."""
    from datetime import datetime

    try:
        sys.stdout.write(f"{datetime.now():%H:%M:%S}  {text}\n")
        sys.stdout.flush()
    except OSError:
        return
