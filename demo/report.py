"""The tables at the end of the demo."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from demo.planning import STREAMS, Advice, ScalingResult
from demo.routing import RoutingResult
from demo.tiers import TierResult


def show(
    console: Console,
    tiers: Sequence[TierResult],
    routing: Sequence[RoutingResult],
    advised: Sequence[Advice],
    scaling: ScalingResult,
) -> None:
    table = Table("where the prompt's KV is", "TTFT (median)", "against cold", "tokens identical to cold")
    for tier in tiers:
        table.add_row(
            tier.name,
            _ms(tier.ttft_seconds),
            f"{tier.ttft_seconds / tiers[0].ttft_seconds:.2f} x",
            _yes(tier.answers_equal_cold),
        )
    _print(console, "1. KV tiering on one replica", table)

    table = Table("router", "prefix hit rate", "TTFT mean", "TTFT p90", "requests")
    for mode in routing:
        table.add_row(
            mode.mode,
            f"{mode.hit_rate:.0%}",
            _ms(mode.ttft_mean_seconds),
            _ms(mode.ttft_p90_seconds),
            str(mode.requests),
        )
    _print(console, "2. Multi-turn chat through dynamo-proxy, two replicas", table)

    table = Table("from second", "replicas", "advice", "decisions", "why (the latest)")
    for advice in advised:
        said = "keep" if advice.desired == advice.current else f"run {advice.desired}"
        after = f"{advice.after_seconds:.0f}"
        table.add_row(after, str(advice.current), said, str(advice.times), advice.explanation)
    _print(console, "3. dynamo-planner, advisory mode: what it would do, and nobody did", table)

    table = Table("step", "result")
    table.add_row("one replica more, by order", f"{scaling.started} ready after {scaling.start_seconds:.0f} s")
    table.add_row("open streams on it when it was ordered away", str(scaling.streams_on_it))
    table.add_row("drained and stopped", f"after {scaling.drain_seconds:.0f} s")
    table.add_row("streams that ended whole", f"{scaling.whole_streams} of {STREAMS}")
    _print(console, "4. dynamo-planner, acting on local processes", table)


def _print(console: Console, title: str, table: Table) -> None:
    table.title, table.title_justify = title, "left"
    console.print()
    console.print(table)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _yes(value: bool) -> str:
    return "[green]yes[/green]" if value else "[red]NO[/red]"
