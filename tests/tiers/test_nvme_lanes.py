"""The threads before a slab: many requests at a time, neighbours joined, and one bad spot costs one block."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.base import Batch, Place
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes, slot_offset
from dynamo_connectors.tiers.nvme_lanes import QUEUE_DEPTH, NvmeTier
from tests.tiers.factories import NAMESPACE
from tests.tiers.test_conformance import noise

CAPACITY = 64
MakeTier = Callable[[int], NvmeTier]


@pytest.fixture
def make_tier(tmp_path: Path) -> Iterator[MakeTier]:
    made: list[NvmeTier] = []

    def make(row_bytes: int) -> NvmeTier:
        made.append(NvmeTier(NvmeStore(tmp_path, CAPACITY, row_bytes, NAMESPACE)))
        return made[-1]

    yield make
    for tier in made:
        assert tier.close(time.monotonic() + 30)
        assert tier.close(time.monotonic() + 30)


def places(slots: Sequence[int], name: str = "key") -> list[Place]:
    return [Place(BlockKey(f"{name}-{slot}".encode()), slot) for slot in slots]


def outcomes(batches: Sequence[Batch], count: int) -> list[str | None]:
    """One per block, in the order of the request."""
    found: dict[int, str | None] = {}
    for batch in batches:
        for position, error in zip(batch.positions, batch.outcome.result(30), strict=True):
            assert position not in found
            found[position] = None if error is None else error.reason
    return [found[position] for position in range(count)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slots=st.lists(st.integers(0, CAPACITY - 1), unique=True, max_size=40), turn=st.integers(0, 10**9))
@pytest.mark.parametrize("row_bytes", [100, 4096])
def test_any_set_of_slots_in_any_order_keeps_its_bytes(
    make_tier: MakeTier, row_bytes: int, slots: list[int], turn: int
) -> None:
    tier = make_tier(row_bytes)
    where = places(slots, f"{turn}")
    rows = [noise(turn + slot, row_bytes) for slot in slots]
    assert set(outcomes(tier.write(where, rows), len(slots))) <= {None}
    back = [memoryview(bytearray(row_bytes)) for _ in slots]
    turned = where[::-1]
    assert set(outcomes(tier.read(turned, back), len(slots))) <= {None}
    assert back[::-1] == rows
    tier.close(time.monotonic() + 30)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned rows", "rows anywhere"])
def test_small_blocks_side_by_side_are_one_large_request(
    make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch, aligned: bool
) -> None:
    row = 16_384
    tier = make_tier(row)
    sizes: list[int] = []
    memory = DramStore(CAPACITY, row)
    rows = [memoryview(memory.rows[n]) if aligned else noise(n, row) for n in range(CAPACITY)]
    for call in ("preadv", "pwritev"):
        real = getattr(os, call)

        def counted(fd: int, parts: list[memoryview], at: int, real: Callable[..., int] = real) -> int:
            sizes.append(sum(part.nbytes for part in parts))
            return real(fd, parts, at)

        monkeypatch.setattr(os, call, counted)
    slots = [*range(50), *range(51, CAPACITY)]
    for move in (tier.write, tier.read):
        assert set(outcomes(move(places(slots), rows[: len(slots)]), len(slots))) == {None}
        assert sum(sizes) == len(slots) * slot_bytes(row)
        assert sorted(sizes) == [slot_bytes(row) * 13, slot_bytes(row) * 50]
        assert min(sizes) >= 256 << 10
        sizes.clear()
    memory.close()


def test_requests_are_as_many_at_a_time_as_the_disk_wants(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make_tier(1 << 20)
    buffers = [noise(n, 1 << 20) for n in range(2 * QUEUE_DEPTH)]
    apart, together = list(range(0, 4 * QUEUE_DEPTH, 2)), list(range(2 * QUEUE_DEPTH))
    assert set(outcomes(tier.write(places(together), buffers), len(buffers))) == {None}
    for call, move, slots in (("preadv", tier.read, together), ("pwritev", tier.write, apart)):
        barrier, real = threading.Barrier(QUEUE_DEPTH), getattr(os, call)

        def meet(*arguments: object, real: Callable[..., int] = real, barrier: threading.Barrier = barrier) -> int:
            barrier.wait(30)  # breaks, and so fails, unless that many are under way at once
            return real(*arguments)

        monkeypatch.setattr(os, call, meet)
        assert set(outcomes(move(places(slots), buffers), len(slots))) == {None}
    assert QUEUE_DEPTH >= 8


def test_large_blocks_side_by_side_are_written_together(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, requests, real = make_tier(1 << 20), [], os.pwritev

    def counted(fd: int, parts: list[memoryview], at: int) -> int:
        requests.append(at)
        return real(fd, parts, at)

    monkeypatch.setattr(os, "pwritev", counted)
    buffers = [noise(n, 1 << 20) for n in range(14)]
    assert set(outcomes(tier.write(places(range(14)), buffers), 14)) == {None}
    assert len(requests) == 2
    monkeypatch.undo()
    back = [memoryview(bytearray(1 << 20)) for _ in buffers]
    assert set(outcomes(tier.read(places(range(14)), back), 14)) == {None}
    assert back == buffers


def test_a_file_cut_inside_a_joined_request_costs_the_blocks_behind_the_cut(make_tier: MakeTier) -> None:
    tier = make_tier(4096)
    slots = list(range(20))
    outcomes(tier.write(places(slots), [noise(n, 4096) for n in slots]), 20)
    os.truncate(tier.store.path, slot_offset(13, 4096))
    back = [memoryview(bytearray(4096)) for _ in slots]
    assert outcomes(tier.read(places(slots), back), 20) == [None] * 13 + ["short_read"] * 7
    assert back[:13] == [noise(n, 4096) for n in range(13)]


def test_a_closed_tier_cancels(make_tier: MakeTier) -> None:
    tier = make_tier(4096)
    tier.close(time.monotonic() + 30)
    for move in (tier.read, tier.write):
        (batch,) = move(places([1]), [noise(1, 4096)])
        assert batch.outcome.cancelled()
