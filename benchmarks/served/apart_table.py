"""The figures of prefill and decode apart, from the raw facts. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.served.record import Fact

#: Requests that come earlier meet engines that are not yet loaded.
_SETTLED_SECONDS = 3.0


def text(facts: Sequence[Fact]) -> str:
    lines: list[str] = []
    for part in (_machine, _sweep, _beside, _load, _equal, _failures):
        lines += part(facts)
    return "\n".join(lines)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; NaN of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else float("nan")


def gap_quantile(tenths: dict[str, int], share: float) -> float:
    """Milliseconds, from counts of tenths."""
    left = share * sum(tenths.values())
    for tenth in sorted(tenths, key=int):
        left -= tenths[tenth]
        if left < 0:
            return int(tenth) / 10
    return float("nan")


def equal_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Those before the first difference."""
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return at
    return min(len(one), len(other))


def _of(facts: Sequence[Fact], part: str) -> list[Fact]:
    return [fact for fact in facts if fact["part"] == part]


def _keys(facts: Sequence[Fact], *names: str) -> list[tuple[Any, ...]]:
    """In order of appearance."""
    return list(dict.fromkeys(tuple(fact[name] for name in names) for fact in facts))


def _median(facts: Sequence[Fact], name: str) -> float:
    return float(statistics.median(fact[name] for fact in facts))


def _machine(facts: Sequence[Fact]) -> list[str]:
    return [f"{key}: {value}" for fact in _of(facts, "size") for key, value in fact.items() if key != "part"]


def _sweep(facts: Sequence[Fact]) -> list[str]:
    rows, sizes = _of(facts, "sweep"), _of(facts, "size")
    if not rows or not sizes:
        return []
    lines = ["", "single prompts, idle engines, medians (ms); KV of whole blocks / (decode leg - HBM hit) in GB/s"]
    lines.append(
        f"{'arm':18}{'tokens':>8}{'TTFT':>9}{'prefill':>9}{'decode':>9}{'HBM hit':>9}{'hand-off':>10}{'GB/s':>7}"
    )
    counts = {(fact["arm"], fact["tokens"]): fact for fact in _of(facts, "sweep_counts")}
    for arm, tokens in _keys(rows, "arm", "tokens"):
        chosen = [row for row in rows if (row["arm"], row["tokens"]) == (arm, tokens)]
        ttft, leg, decode, hit = (_median(chosen, name) * 1e3 for name in ("ttft", "leg", "decode_ttft", "hbm"))
        line = f"{arm:18}{tokens:8}{ttft:9.1f}{leg:9.1f}{decode:9.1f}{hit:9.1f}"
        if leg:
            block = sizes[0]["block_tokens"]
            moved = tokens // block * block * sizes[0]["token_bytes"]
            line += f"{decode - hit:10.1f}{moved / max(1e-6, decode - hit) / 1e6:7.1f}"
            line += f"  {_counted(counts.get((arm, tokens), {}))}"
        lines.append(line)
    return lines


def _counted(counts: Fact) -> str:
    told = {name: value for name, value in counts.items() if ":" in name or name.startswith("dynamo_")}
    return " ".join(f"{name.split('vllm:')[-1].removeprefix('dynamo_')}={value:g}" for name, value in told.items())


def _beside(facts: Sequence[Fact]) -> list[str]:
    rows = _of(facts, "beside")
    if not rows:
        return []
    lines = ["", "single prompts beside streams, medians (ms): what a stream of the decoding engine feels"]
    lines.append(f"{'arm':18}{'tokens':>8}{'TTFT':>9}{'longest gap':>13}{'usual gap':>11}")
    for arm, tokens in _keys(rows, "arm", "tokens"):
        chosen = [row for row in rows if (row["arm"], row["tokens"]) == (arm, tokens)]
        ttft, worst, usual = (_median(chosen, name) * 1e3 for name in ("ttft", "worst_gap", "usual_gap"))
        lines.append(f"{arm:18}{tokens:8}{ttft:9.1f}{worst:13.1f}{usual:11.1f}")
    return lines


def _load(facts: Sequence[Fact]) -> list[str]:
    rows, gaps = [row for row in _of(facts, "load") if row["at"] >= _SETTLED_SECONDS], _of(facts, "load_gaps")
    if not gaps:
        return []
    lines = ["", "the same load (ms): TTFT of short and of long prompts, gaps between tokens of the short ones"]
    names = ("short p50", "short p99", "long p50", "long p99", "gap p50", "gap p99", "gap p99.9", "failed")
    lines.append(f"{'arm':22}{'seed':>5}" + "".join(f"{name:>11}" for name in names))
    for one in gaps:
        mine = [row for row in rows if (row["arm"], row["seed"]) == (one["arm"], one["seed"])]
        values = [
            quantile([row["ttft"] * 1e3 for row in mine if row["kind"] == kind], share)
            for kind in ("short", "long")
            for share in (0.5, 0.99)
        ]
        values += [gap_quantile(one["tenth_ms"], share) for share in (0.5, 0.99, 0.999)]
        told = "".join(f"{value:11.1f}" for value in values)
        lines.append(f"{one['arm']:22}{one['seed']:5}{told}{one['failed']:11}  {_counted(one)}")
        if one["failed"]:
            lines.append(f"    {one['first_error']}")
    return lines


def _equal(facts: Sequence[Fact]) -> list[str]:
    rows = _of(facts, "equal")
    if not rows:
        return []
    answers = {(row["arm"], row["turn"], row["prompt"]): row["tokens"] for row in rows}
    reference, *others = _keys(rows, "arm", "turn")
    lines = ["", f"greedy answers compared with those of {reference[0]}, cold"]
    for arm, turn in others:
        pairs = list(_pairs(answers, reference, (arm, turn)))
        whole = Counter(one == other for one, other in pairs)[True]
        tokens = sum(equal_tokens(one, other) for one, other in pairs)
        first = sum(one[:1] == other[:1] for one, other in pairs)
        what = f"{arm}{', again' if turn else ''}: {whole} of {len(pairs)} answers equal, first token in {first}"
        lines.append(f"{what}, {tokens} of {sum(len(one) for one, _ in pairs)} tokens before the first difference")
    return lines


def _pairs(
    answers: dict[tuple[Any, ...], Sequence[int]], reference: tuple[Any, ...], other: tuple[Any, ...]
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    for arm, turn, number in answers:
        if (arm, turn) == other and (*reference, number) in answers:
            yield answers[(*reference, number)], answers[(arm, turn, number)]


def _failures(facts: Sequence[Fact]) -> list[str]:
    lines = [f"FAILED {fact['what']}: {fact['error']}" for fact in _of(facts, "failure")]
    return ["", *lines] if lines else []
