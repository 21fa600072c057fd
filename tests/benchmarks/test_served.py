"""What the engine bench makes of raw figures: a goal is judged on its own figures, and never without them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from benchmarks.gpu_engine import Schedule
from benchmarks.served import verdict
from benchmarks.served.arms import DYNAMO_ARM, FP8, GIB, NATIVE, NONE, TIMED, gpu_arms, waves
from benchmarks.served.client import Answer
from benchmarks.served.exactness import first_difference
from benchmarks.served.record import Fact, Record, read


def prefix(arm: str, kind: str, ttft: float) -> Fact:
    return {"part": "prefix", "arm": arm, "kind": kind, "ttft": ttft, "prompt": 0, "tokens": [1]}


#: 1000 tokens are 0.131072 GB: 10 ms at 13.1072 GB/s.
RAW: list[Fact] = [
    {"part": "machine", "pcie_up_gb_s": 13.1072, "disk_read_gb_s": 2.0},
    {"part": "prefix_size", "tokens": 1000, "block_tokens": 16},
    *(prefix(DYNAMO_ARM, kind, ttft) for kind, ttft in (("cold", 0.2), ("hbm", 0.02), ("tier", 0.03))),
    prefix(NONE, "hbm", 0.01),
    prefix(NATIVE, "tier", 0.025),
]


def test_the_floor_of_a_hit_is_its_bytes_and_an_hbm_hit() -> None:
    assert abs(verdict.prefix_floor_seconds(RAW) - 0.02) < 1e-9


def test_goals_are_judged_and_told() -> None:
    met = {goal.what: (round(goal.value, 3), goal.met) for goal in verdict.goals(RAW)}
    assert met == {
        "DRAM hit / (KV bytes at the PCIe rate + HBM hit)": (1.5, False),
        "DRAM hit / cold": (0.15, True),
        "DRAM hit / vLLM's own offloading": (1.2, False),
    }
    assert "MISSED DRAM hit / vLLM's own offloading: 1.200 (want <= 0.9)" in verdict.text(RAW)


def test_nothing_is_judged_without_figures() -> None:
    assert verdict.goals([]) == []
    assert verdict.text([]) == ""


def test_only_loads_from_the_disk_alone_count_for_its_rate() -> None:
    def disk(kind: str, ttft: float, from_disk: int, from_dram: int) -> Fact:
        blocks = {"disk_blocks": from_disk, "dram_blocks": from_dram}
        return {"part": "disk", "arm": "a", "prompt": 0, "kind": kind, "ttft": ttft, "prompt_tokens": 1000, **blocks}

    # 100 blocks of 16 tokens in one second over the HBM hit.
    lines = [disk("hbm", 0.5, 0, 0), disk("disk", 1.5, 100, 0), disk("disk", 0.6, 50, 50), disk("disk", 0.7, 0, 100)]
    assert abs(verdict.disk_rate([*RAW, *lines]) - 0.2097152) < 1e-9


def test_the_first_difference_may_be_a_logprob() -> None:
    wanted = Answer((5, 6, 7), (-0.1, -0.2, -0.3), 0.0, 0.0)
    assert first_difference(wanted, wanted) is None
    assert first_difference(wanted._replace(logprobs=(-0.1, -0.25, -0.3)), wanted) == 1
    assert first_difference(wanted._replace(tokens=(4, 6, 7)), wanted) == 0


def test_compared_arms_differ_in_their_tier_alone(tmp_path: Path) -> None:
    arms = {arm.name: arm for arm in gpu_arms(tmp_path)}
    compared = [arms[name] for name in (NONE, NATIVE, DYNAMO_ARM)]
    assert len({(arm.kv_gib, arm.hbm_blocks, arm.max_tokens, arm.batch_invariant) for arm in compared}) == 1


def test_a_failure_is_in_the_text(tmp_path: Path) -> None:
    record = Record(tmp_path / "raw.jsonl")
    record.note("failure", what="chat", error="TimeoutError: ")
    record.close()
    assert "FAILED chat: TimeoutError" in verdict.text(read(tmp_path / "raw.jsonl"))


def test_engines_run_in_as_few_waves_as_the_gpu_holds(tmp_path: Path) -> None:
    by_name = {arm.name: arm for arm in gpu_arms(tmp_path)}
    timed = [by_name[name] for name in TIMED]
    assert [[arm.name for arm in wave] for wave in waves(timed, 139 * GIB)] == [list(TIMED)]
    assert [[arm.name for arm in wave] for wave in waves(timed, 79 * GIB)] == [[NONE, DYNAMO_ARM], [NATIVE, FP8]]
    assert [len(wave) for wave in waves(timed, 24 * GIB)] == [1, 1, 1, 1], "an engine too large is still tried"
    assert len(waves(timed, None)) == 1
    assert waves([], 79 * GIB) == []


def test_a_part_without_time_is_named_and_one_that_fails_costs_no_other(tmp_path: Path) -> None:
    record = Record(tmp_path / "raw.jsonl")
    done: list[str] = []

    async def part(name: str) -> None:
        done.append(name)
        if name == "bad":
            raise ValueError("no")

    async def run() -> None:
        late, early = (Schedule(record, (), time.monotonic() + seconds) for seconds in (1.0, 100.0))
        await early.run("bad", part("bad"))
        await late.run("late", part("late"))
        await early.run("good", part("good"))

    asyncio.run(run())
    record.close()
    assert done == ["bad", "good"]
    failures = {fact["what"]: fact["error"] for fact in read(tmp_path / "raw.jsonl")}
    assert failures.keys() == {"bad", "late"}
    assert failures["bad"] == "ValueError: no"
    assert failures["late"].startswith("not begun")
