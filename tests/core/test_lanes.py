"""Threads that survive their tasks, end in time, and wake everybody who waits for them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, wait

import pytest
import torch
from dynamo_kernels import BlockView

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import PEER
from dynamo_connectors.errors import StoreError
from dynamo_connectors.jobs import LoadItem
from dynamo_connectors.lanes import Lane
from dynamo_connectors.loads import LoadFromBelow
from dynamo_connectors.staging import StagingRows
from dynamo_connectors.tiers.base import Batch, Buffer, Place
from dynamo_connectors.tiers.dram import DramStore

NO_THREADS = """
import os, resource, threading
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.lanes import Lane
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
if os.getuid() == 0:
    os.setuid(65534)
try:
    Lane("x", 4)
except ConfigError as error:
    print(error)
print(threading.active_count())
"""
#: A lane hangs for ever in a task: the interpreter must end all the same.
HANGS_AT_EXIT = """
import threading, time
from dynamo_connectors.lanes import Lane
lane = Lane("x", 1)
started = threading.Event()
lane.submit(lambda: started.set() or threading.Event().wait())
lane.submit(print)
started.wait()
assert not lane.stop(time.monotonic() + 0.2)
print("ended")
"""


def child(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()


def later(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def test_tasks_of_one_thread_run_in_order() -> None:
    lane, seen = Lane("x", 1), []
    wait([lane.submit(lambda number=number: seen.append(number)) for number in range(100)])
    assert seen == list(range(100))
    assert lane.stop(later())


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_whatever_a_task_raises_is_its_result_and_the_thread_goes_on(error: type[BaseException]) -> None:
    lane = Lane("x", 1)

    def die() -> None:
        raise error

    for _ in range(3):
        assert isinstance(lane.submit(die).exception(20), error)
    assert lane.submit(lambda: 7).result(20) == 7
    assert lane.stop(later())


def test_stopping_cancels_what_waits_and_wakes_those_who_wait_for_it() -> None:
    lane, release, started = Lane("x", 1), threading.Event(), threading.Event()
    running = lane.submit(lambda: started.set() or release.wait(60))
    assert started.wait(20)
    waiting = [lane.submit(lambda: None) for _ in range(5)]
    woken: list[int] = []
    waiter = threading.Thread(target=lambda: woken.append(len(wait(waiting, 60).done)))
    waiter.start()
    assert not lane.stop(time.monotonic())
    waiter.join(20)
    assert woken == [5]
    assert all(task.cancelled() for task in waiting)
    release.set()
    assert running.result(20)
    assert lane.stop(later())


def test_a_stopped_lane_cancels_at_once() -> None:
    lane = Lane("x", 2)
    assert lane.stop(later())
    assert lane.stop(later())
    with pytest.raises(CancelledError):
        lane.submit(lambda: None).result(20)


def test_a_cancelled_task_never_runs() -> None:
    lane, release, ran = Lane("x", 1), threading.Event(), threading.Event()
    first = lane.submit(lambda: release.wait(60))
    second = lane.submit(ran.set)
    assert second.cancel()
    release.set()
    assert first.result(20)
    assert lane.submit(lambda: 1).result(20) == 1
    assert not ran.is_set()
    assert lane.stop(later())


def test_a_host_without_threads_is_one_line() -> None:
    line, threads = child(NO_THREADS)
    assert "ulimit -u" in line
    assert threads == "1"


def test_a_task_that_hangs_for_ever_does_not_keep_the_process() -> None:
    assert child(HANGS_AT_EXIT) == ["ended"]


class SilentTier:
    """One read is given up at once, and ends later."""

    deadline_seconds = 60.0

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Batch]:
        given_up: Future[str] = Future()
        given_up.set_result("unreachable")
        outcome: Future[Sequence[StoreError | None]] = Future()
        outcome.set_running_or_notify_cancel()  # NIXL cannot cancel
        self.batches.append(Batch(range(len(places)), outcome, given_up=given_up))
        return self.batches[-1:]

    def write(self, places: Sequence[Place], rows: Sequence[Buffer]) -> list[Batch]:
        raise NotImplementedError

    def close(self, deadline: float) -> bool:
        return True


def test_a_load_does_not_wait_for_a_read_that_its_tier_has_given_up() -> None:
    staging = StagingRows(DramStore(4, 8), BlockView.of_pages([torch.zeros((8, 8), dtype=torch.uint8)], [8]))
    tier, failed = SilentTier(), dict[BlockKey, str]()
    items = [LoadItem(BlockKey(b"key%d" % at), PEER, at, at) for at in range(3)]
    assert LoadFromBelow(tier, staging).run(items, 3600.0, failed) == 0
    assert set(failed.values()) == {"unreachable"}
    assert len(failed) == 3
    assert len(staging._free) < 4, "something may still write to its rows"
    tier.batches[0].outcome.set_result([None] * 3)
    assert len(staging._free) == 4
    staging.store.close()


def test_staging_rows_are_never_handed_out_twice() -> None:
    staging = StagingRows(DramStore(4, 8), BlockView.of_pages([torch.zeros((2, 8), dtype=torch.uint8)], [8]))
    first, second = staging.take(3), staging.take(3)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert staging.take(1) == []
    assert staging.take(1, 0.01) == []
    staging.give(second)
    assert len(staging._free) == 1
    assert staging.take(2) == second
    staging.give(first + second)
    assert len(staging._free) == 4
    staging.check()
    staging.give([1])
    with pytest.raises(AssertionError, match="given back twice"):
        staging.check()
    staging._free.remove(1)
    staging.store.close()
