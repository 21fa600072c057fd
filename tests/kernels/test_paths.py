"""Every path over host memory that stands for HBM: exactly the right bytes, whatever the sizes, offsets and distances.

The copy engines and the kernels are played by `FakeMachine`, which follows addresses; the tables are the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from dynamo_kernels.choices import Choice, Direction, Path
from dynamo_kernels.errors import CopyError
from dynamo_kernels.inside import InsidePlan
from dynamo_kernels.plan import CopyPlan
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.fake_machine import FakeMachine
from tests.kernels.memory import Arena, arena, naive_copy

KINDS = [Choice(Path.DMA), Choice(Path.ZERO_COPY), Choice(Path.SPLIT, 1, 0.5), Choice(Path.STAGED)]
#: What only stores of whole tiles take.
TMA = Choice(Path.TMA, 2)
SIZES = [1, 16, 17, 144, 4096, 4097, 18432, 65536, 65552]


def copied(choice: Choice, direction: Direction, src: Arena, src_ids: Sequence[int], dst: Arena) -> FakeMachine:
    """Copies `src_ids` over blocks 1, 0, 2 ... and checks every byte of both sides."""
    dst_ids = [1, 0, 2, 4, 3][: len(src_ids)]
    expected, before = naive_copy(src, src_ids, dst, dst_ids), src.images()
    machine = FakeMachine()
    plan = CopyPlan(src.view, dst.view, direction, machine, lambda case: allowed(choice, case))
    plan.enqueue(src_ids, dst_ids)
    assert dst.images() == expected
    assert src.images() == before
    assert machine.tape.races() == []
    return machine


def allowed(choice: Choice, case: object) -> Choice:
    return choice if case.allows(choice.path) else Choice(Path.DMA)  # type: ignore[attr-defined]


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("choice", KINDS, ids=lambda choice: choice.path.value)
@pytest.mark.parametrize("size", SIZES)
def test_pages_and_rows(size: int, choice: Choice, direction: Direction) -> None:
    blocks = 6 if size < 10_000 else 3
    ids = [5, 0, 3, 3] if blocks == 6 else [2, 0]
    copied(choice, direction, arena(blocks, [size] * 3, 16, 0, 1), ids, arena(blocks, [size] * 3, 0, 16, 2))


@pytest.mark.parametrize("size", [128, 4096, 65536])
def test_pages_to_rows_and_back_inside_one_gpu(size: int) -> None:
    pages, rows = arena(5, [size] * 3, 16, 0, 1), arena(4, [size] * 3, 0, 16, 2)
    for src, src_ids, dst, dst_ids in ((pages, [4, 0, 2], rows, [1, 0, 3]), (rows, [3, 1], pages, [0, 3])):
        expected, machine = naive_copy(src, src_ids, dst, dst_ids), FakeMachine()
        InsidePlan(src.view, dst.view, machine).enqueue(np.array(src_ids), np.array(dst_ids))
        assert dst.images() == expected
        assert set(machine.calls) == {"direct"}


@pytest.mark.parametrize("choice", KINDS, ids=lambda choice: choice.path.value)
def test_a_row_of_parts_of_several_sizes(choice: Choice) -> None:
    copied(
        choice, Direction.H2D, arena(4, [144, 16, 144, 33], 0, 0, 1), [2, 1, 0], arena(5, [144, 16, 144, 33], 7, 3, 2)
    )


@settings(max_examples=80, deadline=None)
@given(
    choice=st.sampled_from(KINDS),
    direction=st.sampled_from(list(Direction)),
    sizes=st.lists(st.sampled_from([1, 15, 16, 128, 144, 256]), min_size=1, max_size=4),
    places=st.tuples(*[st.sampled_from([0, 1, 8, 16])] * 4),
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
def test_any_layout(
    choice: Choice, direction: Direction, sizes: list[int], places: tuple[int, ...], ids: list[int]
) -> None:
    src, dst = arena(5, sizes, places[0], places[1], 1), arena(5, sizes, places[2], places[3], 2)
    copied(choice, direction, src, ids, dst)


@pytest.mark.parametrize(("size", "kernel"), [(16 << 10, "through_tma"), (48 << 10, "through_tma"), (20 << 10, "none")])
def test_stores_of_whole_tiles_go_by_tma(size: int, kernel: str) -> None:
    for has_tma in (True, False):
        src, dst = layers(4, size, 2), contiguous(4, size, 2)
        machine = FakeMachine()
        machine.has_tma = has_tma
        plan = CopyPlan(src.view, dst.view, Direction.D2H, machine, lambda case: allowed(TMA, case))
        plan.enqueue([3, 0, 2], [0, 1, 3])
        assert (kernel in machine.calls) == (has_tma and kernel != "none")
        assert machine.tape.races() == []
        for part, target in zip(src.view.parts, dst.view.parts, strict=True):
            assert (part[[3, 0, 2]] == target[[0, 1, 3]]).all()
        (case,) = plan.cases(3)
        assert case == plan.decisions[0].case
        loading = CopyPlan(dst.view, src.view, Direction.H2D, machine, lambda case: Choice(Path.DMA))
        assert not loading.cases(3)[0].allows(Path.TMA)


def test_short_parts_at_one_distance_are_lines_and_long_ones_are_not() -> None:
    for size, calls in ((4096, ["lines"]), (65536, ["fragments"])):
        src, dst = layers(3, size, 2), contiguous(3, size, 2)
        plan = CopyPlan(src.view, dst.view, Direction.D2H, machine := FakeMachine(), lambda case: Choice(Path.DMA))
        plan.enqueue([2, 0], [0, 1])
        assert machine.calls == calls


def contiguous(blocks: int, size: int, parts: int) -> Arena:
    """Parts cut out of one allocation, so that they are at one distance."""
    from dynamo_kernels import BlockView

    whole = arena(blocks, [size * parts], 0, 0, 3)
    return Arena(BlockView.of_rows(whole.view.parts[0], [size] * parts), whole.allocations, 0, size * parts)


def layers(blocks: int, size: int, parts: int) -> Arena:
    """Pages of equally distant layers: (parts, blocks, size)."""
    from dynamo_kernels import BlockView

    memory = torch.randint(0, 255, (parts, blocks, size), dtype=torch.uint8)
    return Arena(BlockView.of_pages(memory.unbind(0), [size] * parts), [memory], 0, size)


def test_a_staged_copy_reuses_its_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_kernels.plan._STAGING_BYTES", 2 * 3 * 128)
    src, rows = arena(9, [128] * 3, 0, 0, 1), contiguous(9, 128, 3)
    ids = [8, 1, 0, 7, 2, 6, 3, 5, 4]
    for direction, one, other in ((Direction.D2H, src, rows), (Direction.H2D, rows, src)):
        machine = FakeMachine()
        plan = CopyPlan(one.view, other.view, direction, machine, lambda case: Choice(Path.STAGED))
        plan.enqueue(ids, list(range(9)))
        assert len(machine.calls) == 10
        assert machine.tape.races() == []
        for part, target in zip(one.view.parts, other.view.parts, strict=True):
            assert (part[np.array(ids)] == target).all()


@pytest.mark.parametrize("ids", [([5], [0]), ([0], [9]), ([0, 1], [2, 2]), ([0], [0, 1]), ([-1], [0])])
def test_a_refused_plan_enqueues_nothing(ids: tuple[list[int], list[int]]) -> None:
    src, dst = arena(5, [16], 0, 0, 1), arena(5, [16], 0, 0, 2)
    machine = FakeMachine()
    with pytest.raises(CopyError):
        CopyPlan(src.view, dst.view, Direction.H2D, machine, lambda case: Choice(Path.DMA)).enqueue(*ids)
    assert machine.calls == []


@pytest.mark.parametrize("ids", [[0.5], ["1"], [[0]], np.array([2**63], np.uint64)], ids=str)
def test_ids_that_are_no_block_numbers_are_refused(ids: object) -> None:
    view = arena(5, [16], 0, 0, 1).view
    plan = CopyPlan(view, view, Direction.H2D, FakeMachine(), lambda case: Choice(Path.DMA))
    with pytest.raises(CopyError):
        plan.enqueue(ids, [0])  # type: ignore[arg-type]
