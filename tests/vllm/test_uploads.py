"""What the scheduler half does with an object that not every worker stored, and how workers' reasons are joined."""

from __future__ import annotations

from itertools import permutations

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.jobs import JobReport
from dynamo_connectors.vllm.messages import WorkerReports
from tests.vllm.fakes import BLOCK, end, make, offer_all, request

#: A worker's part of the object: stored now, there already (another replica's), lost on its way, or never sent.
STORED, FOUND = (None, True), (None, False)
UNCONFIRMED, UNSENT = ("timeout", True), ("tier_off", False)


@pytest.mark.parametrize(
    ("ends", "is_erased"),
    [
        ([UNCONFIRMED], True),
        ([UNSENT], False),
        ([("timeout", False)], False),
        ([UNSENT, UNSENT], False),
        ([FOUND, UNSENT], False),
        ([STORED, UNSENT], True),
        ([UNCONFIRMED, UNSENT], True),
        ([FOUND, UNCONFIRMED, UNSENT], True),
    ],
)
@pytest.mark.parametrize("is_summed", [False, True], ids=["step by step", "in one step"])
def test_an_object_is_erased_only_if_this_engine_may_have_left_a_part_of_it(
    ends: list[tuple[str | None, bool]], is_erased: bool, is_summed: bool
) -> None:
    """Erasing one that another replica has stored, and that we never touched, would lose it for all of them."""
    for order in set(permutations(ends)):
        half, _ = make(objects=4, workers=len(ends))
        what = request("a", 2)
        plan = offer_all(half, what, [1, 2])
        for _ in ends:
            end(half, plan)
        half.finished(what, [[1, 2]], 2 * BLOCK)
        (job,) = half.plan(is_idle=True).moves
        reports = []
        for reason, sent in order:
            failed = dict.fromkeys(what.block_hashes, reason) if reason is not None else {}
            reports.append(WorkerReports.of([JobReport(job.job_id, failed, sent=sent)]))
        if is_summed:
            for other in reports[1:]:
                reports[0] = reports[0].aggregate(other)
            del reports[1:]
        for report in reports:
            half.worker_reports(report)
        erasures = half.plan(is_idle=True)
        assert [erasure.chunks for erasure in erasures.erasures] == [(what.block_hashes[1],)] * is_erased, order
        for _ in ends:
            end(half, erasures)
        assert half.tier_stats()["object_store"].evicting_blocks == 0
        half.check()


@pytest.mark.parametrize("is_summed", [False, True], ids=["step by step", "in one step"])
def test_a_block_that_is_damaged_on_one_worker_is_never_served_again(is_summed: bool) -> None:
    """Whatever the others say, and in whichever order they say it."""
    for reasons in permutations(["timeout", "bad_checksum", "unreachable"]):
        half, _ = make(disk=8, workers=3)
        what = request("a", 1)
        plan = offer_all(half, what, [1])
        for _ in reasons:
            end(half, plan)
        half.finished(what, [[1]], BLOCK)
        down = half.plan(is_idle=True)
        for _ in reasons:
            end(half, down)
        for index in range(8):  # host memory is filled with others
            offered = offer_all(half, request(f"other-{index}", 1), [2 + index])
            for _ in reasons:
                end(half, offered)
        again = request("b", 2, prefix="a")
        half.new_request(again)
        assert half.matched_tokens(again, 0) == BLOCK
        half.after_alloc(again, [[20, 21]], BLOCK)
        (load,) = half.plan(is_idle=False).loads
        assert load.items[0].tier == "nvme_ssd"
        key: BlockKey = what.block_hashes[0]
        reports = [WorkerReports.of([JobReport(load.job_id, {key: reason})]) for reason in reasons]
        if is_summed:
            reports = [reports[0].aggregate(reports[1]).aggregate(reports[2])]
        for report in reports:
            half.worker_reports(report)
        third = request("c", 2, prefix="a")
        half.new_request(third)
        assert half.matched_tokens(third, 0) == 0
        assert half.take_counts()["load_failures", "bad_checksum"] == 1
        half.check()
