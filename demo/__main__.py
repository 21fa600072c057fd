"""Runs the demo: `python -m demo`. Exit code 0 only when every answer was identical and no stream was cut."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from demo import planning, routing, tiers
from demo.fleet import Fleet
from demo.report import show
from tools.server_process import ServerError
from tools.tiny_model import make_model

BUILD = Path(__file__).resolve().parent.parent / ".build"
ADVISER = "planner-advising"


@contextmanager
def bar(console: Console, text: str, total: int | None = None) -> Iterator[Any]:
    """A progress bar on a terminal, and one line with the time it took anywhere."""
    counter = (BarColumn(), MofNCompleteColumn()) if total else (SpinnerColumn(),)
    columns = (TextColumn("{task.description}"), *counter, TimeElapsedColumn())
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda: progress.advance(task)
    console.print(f"{text}: {time.monotonic() - started:.0f} s")


def run(console: Console, fleet: Fleet) -> int:
    with bar(console, "starting two vLLM replicas with --kv-connector dynamo") as tick:
        fleet.start_replicas(2)
        fleet.wait_replicas(lambda _waited: tick())
    with bar(console, "starting dynamo-proxy and dynamo-planner (advisory)") as tick:
        fleet.start_proxy()
        fleet.start_planner(ADVISER, "--stabilisation-seconds", "15")
    with bar(console, "cold, HBM hit, DRAM hit", tiers.steps()) as tick:
        tier_results = tiers.run(fleet.replicas[0], tick)
    with bar(console, "multi-turn chat, round-robin and KV-aware", routing.steps()) as tick:
        routing_results = routing.run(fleet, tick)
    with bar(console, "one replica more, then drained away") as tick:
        scaling = planning.scale_up_and_down(fleet, lambda _what: tick())
    advised = planning.advice(fleet.decision_log(ADVISER))
    show(console, tier_results, routing_results, advised, scaling)
    identical = all(result.answers_equal_cold for result in tier_results)
    return 0 if identical and scaling.whole_streams == planning.STREAMS else 1


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    logs = BUILD / "demo-logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.iterdir():
        old.unlink()
    with bar(console, "making a tiny random model"):
        model = make_model(BUILD / "tiny-model")
    fleet = Fleet(model, logs)
    try:
        code = run(console, fleet)
    except KeyboardInterrupt:
        console.print("\ninterrupted: stopping everything")
        return 130
    except ServerError as error:
        console.print(f"[red]demo: {error}[/red]\nlogs: {logs}", highlight=False)
        return 1
    finally:
        # Impatience must not leave engines behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with bar(console, "stopping everything"):
            fleet.close()
    console.print(f"\nlogs: {logs.relative_to(BUILD.parent)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
