"""From raw lines to medians, ratios and goals. Pure: the same file always gives the same text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.served.arms import DYNAMO_ARM, FP8, NATIVE, NONE
from benchmarks.served.record import Fact

#: One token of Llama-3.1-8B: 32 layers, keys and values, 8 heads of 128 in bfloat16.
KV_BYTES_PER_TOKEN = 32 * 2 * 8 * 128 * 2


class Goal(NamedTuple):
    what: str
    value: float
    bound: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{'met   ' if self.met else 'MISSED'} {self.what}: {self.value:.3f} (want {sign} {self.bound:g})"


def median(raw: Sequence[Fact], value: str, **where: object) -> float:
    """Of `value` over the lines that carry `where`; nan without any."""
    found = [fact[value] for fact in raw if value in fact and where.items() <= fact.items()]
    return statistics.median(found) if found else float("nan")


def mean(raw: Sequence[Fact], value: str, **where: object) -> float:
    found = [fact[value] for fact in raw if value in fact and where.items() <= fact.items()]
    return statistics.fmean(found) if found else float("nan")


def arms_of(raw: Sequence[Fact], part: str) -> list[str]:
    return list(dict.fromkeys(fact["arm"] for fact in raw if fact["part"] == part))


def text(raw: Sequence[Fact]) -> str:
    lines: list[str] = []
    for section in (_machine, _prefix, _disk, _load, _chat, _exact):
        lines += section(raw)
    lines += [str(goal) for goal in goals(raw)]
    lines += [f"FAILED {fact['what']}: {fact['error']}" for fact in raw if fact["part"] == "failure"]
    return "\n".join(lines)


def goals(raw: Sequence[Fact]) -> list[Goal]:
    """Those whose figures are there."""
    found = [*_prefix_goals(raw), *_disk_goals(raw), *_load_goals(raw), *_chat_goals(raw)]
    return [goal for goal in found if goal.value == goal.value]


def prefix_floor_seconds(raw: Sequence[Fact]) -> float:
    """The KV of the prefix at the PCIe rate of this run, and the HBM hit of the engine alone behind it."""
    tokens = next((fact["tokens"] for fact in raw if fact["part"] == "prefix_size"), float("nan"))
    rate = median(raw, "pcie_up_gb_s", part="machine") * 1e9
    return tokens * KV_BYTES_PER_TOKEN / rate + _ttft(raw, NONE, "hbm")


def _ttft(raw: Sequence[Fact], arm: str, kind: str) -> float:
    return median(raw, "ttft", part="prefix", arm=arm, kind=kind)


def _prefix_goals(raw: Sequence[Fact]) -> Iterator[Goal]:
    hit = _ttft(raw, DYNAMO_ARM, "tier")
    yield Goal("DRAM hit / (KV bytes at the PCIe rate + HBM hit)", hit / prefix_floor_seconds(raw), 1.3, True)
    yield Goal("DRAM hit / cold", hit / _ttft(raw, DYNAMO_ARM, "cold"), 0.2, True)
    yield Goal("DRAM hit / vLLM's own offloading", hit / _ttft(raw, NATIVE, "tier"), 0.9, True)
    yield Goal("fp8 DRAM hit / DRAM hit", _ttft(raw, FP8, "tier") / hit, 0.75, True)


def disk_rate(raw: Sequence[Fact]) -> float:
    """GB/s of the loads that came wholly from disk, over what the request took longer than an HBM hit.

    A few blocks that the gate tried in a prompt that it refused are no such load.
    """
    block_tokens = median(raw, "block_tokens", part="prefix_size")
    block_bytes = block_tokens * KV_BYTES_PER_TOKEN
    hbm = {"disk": median(raw, "ttft", part="disk", kind="hbm"), "gate": _ttft(raw, DYNAMO_ARM, "hbm")}
    rates = [
        fact["disk_blocks"] * block_bytes / (fact["ttft"] - hit) / 1e9
        for kind, hit in hbm.items()
        for fact in _disk_lines(raw, kind)
        if not fact["dram_blocks"] and fact["ttft"] > hit
        if fact["disk_blocks"] * block_tokens > fact["prompt_tokens"] / 2
    ]
    return statistics.median(rates) if rates else float("nan")


def _disk_lines(raw: Sequence[Fact], kind: str) -> list[Fact]:
    return [fact for fact in raw if fact["part"] == "disk" and fact["kind"] == kind]


def _disk_goals(raw: Sequence[Fact]) -> Iterator[Goal]:
    own = median(raw, "disk_read_gb_s", part="machine")
    yield Goal("load from NVMe / the disk's own O_DIRECT rate", disk_rate(raw) / own, 0.85, False)
    gated = [fact["ttft"] for fact in _disk_lines(raw, "gate")]
    if gated:
        cold = _ttft(raw, DYNAMO_ARM, "cold")
        yield Goal("prefix left to the gate / cold", statistics.median(gated) / cold, 1.05, True)


def _load_goals(raw: Sequence[Fact]) -> Iterator[Goal]:
    rate = {arm: median(raw, "tokens_per_second", part="load", arm=arm) for arm in (NONE, DYNAMO_ARM)}
    yield Goal("throughput without hits / no tier", rate[DYNAMO_ARM] / rate[NONE], 0.99, False)


def _chat_goals(raw: Sequence[Fact]) -> Iterator[Goal]:
    means = {arm: mean(raw, "ttft", part="chat", arm=arm) for arm in (NONE, DYNAMO_ARM)}
    yield Goal("chat, mean TTFT / engine alone", means[DYNAMO_ARM] / means[NONE], 0.6, True)


def _machine(raw: Sequence[Fact]) -> list[str]:
    return [f"machine {fact}" for fact in raw if fact["part"] == "machine"]


def _prefix(raw: Sequence[Fact]) -> list[str]:
    if not arms_of(raw, "prefix"):
        return []
    lines = [
        f"DRAM hit, floor from this run: {prefix_floor_seconds(raw) * 1e3:.1f} ms",
        _row("TTFT ms", "cold", "HBM", "tier"),
    ]
    for arm in arms_of(raw, "prefix"):
        times = (f"{_ttft(raw, arm, kind) * 1e3:.1f}" for kind in ("cold", "hbm", "tier"))
        same, asked = _same_as_hbm(raw, arm)
        lines.append(_row(arm, *times) + f"   answers like the HBM hit's: {same} of {asked}")
    return lines


def _same_as_hbm(raw: Sequence[Fact], arm: str) -> tuple[int, int]:
    """Timed engines are not batch-invariant, so a difference is a question and not yet a fault."""
    mine = [fact for fact in raw if fact["part"] == "prefix" and fact["arm"] == arm]
    wanted = {fact["prompt"]: fact["tokens"] for fact in mine if fact["kind"] == "hbm"}
    hits = [fact for fact in mine if fact["kind"] == "tier"]
    return sum(fact["tokens"] == wanted.get(fact["prompt"]) for fact in hits), len(hits)


def _disk(raw: Sequence[Fact]) -> list[str]:
    found = [f"load from NVMe: {disk_rate(raw):.2f} GB/s"] if _disk_lines(raw, "disk") else []
    for fact in (*_disk_lines(raw, "disk"), *_disk_lines(raw, "gate")):
        blocks = f"{fact['disk_blocks']:.0f} blocks from disk, {fact['dram_blocks']:.0f} from DRAM"
        found.append(f"  {fact['kind']}: {fact['prompt_tokens']} tokens, TTFT {fact['ttft'] * 1e3:.1f} ms, {blocks}")
    return found


def _load(raw: Sequence[Fact]) -> list[str]:
    return _each_arm(raw, "load", "tokens/s", lambda arm: median(raw, "tokens_per_second", part="load", arm=arm))


def _chat(raw: Sequence[Fact]) -> list[str]:
    return _each_arm(raw, "chat", "chat TTFT ms", lambda arm: mean(raw, "ttft", part="chat", arm=arm) * 1e3)


def _each_arm(raw: Sequence[Fact], part: str, title: str, value: Callable[[str], float]) -> list[str]:
    return [_row(f"{title}, {arm}", f"{value(arm):.1f}") for arm in arms_of(raw, part)]


def _exact(raw: Sequence[Fact]) -> list[str]:
    return [
        f"{fact['what']}: {fact['same']} of {fact['prompts']} bit-equal, "
        f"{fact['first_token_differs']} differ in their first token"
        for fact in raw
        if fact["part"] == "exact"
    ]


def _row(name: str, *cells: str) -> str:
    return f"{name:<26}" + "".join(f"{cell:>10}" for cell in cells)
