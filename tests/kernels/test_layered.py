"""Loads that arrive by layers: how they are cut, that every byte comes, and that no wait can be left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dynamo_kernels import BlockView, ComputeFence
from dynamo_kernels.choices import Choice, Path
from dynamo_kernels.errors import CopyError
from dynamo_kernels.layered import LayeredCopy, LayerStream, group_of, groups_for, prepare_layers

from tests.kernels.fake_machine import FakeMachine
from tests.kernels.stream_order import Tape

CPU = torch.device("cpu")
MIB = 1 << 20
BLOCKS = 12
ALIKE, MIXED = [128] * 8, [128, 256] * 4


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_kernels.layered._GROUP_BYTES", 1)
    monkeypatch.setattr("dynamo_kernels.plan._STAGING_BYTES", 2 * 4 * 128)


def test_small_loads_and_few_layers_make_fewer_groups() -> None:
    assert [groups_for(32, size * MIB) for size in (8, 15, 16, 32, 63, 64, 4096)] == [1, 1, 2, 4, 4, 8, 8]
    assert [groups_for(parts, 4096 * MIB) for parts in (1, 3, 4, 7, 8, 16, 80)] == [1, 1, 2, 2, 4, 8, 8]


@pytest.mark.parametrize("parts", [2, 5, 8, 31, 80])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_part_is_in_one_group_and_groups_follow_each_other(parts: int, groups: int) -> None:
    found = [group_of(part, parts, groups) for part in range(parts)]
    assert found == sorted(found)
    assert set(found) == set(range(groups))


def views(sizes: list[int]) -> tuple[BlockView, BlockView]:
    pages = [torch.randint(0, 255, (BLOCKS, size), dtype=torch.uint8) for size in sizes]
    rows = torch.randint(0, 255, (BLOCKS, sum(sizes)), dtype=torch.uint8)
    return BlockView.of_rows(rows, sizes), BlockView.of_pages(pages, sizes)


SOURCES, TARGETS = [1, 3, 5, 7, 0], [11, 2, 4, 0, 9]


def assert_copied(rows: BlockView, pages: BlockView, before: list[torch.Tensor], parts: range) -> None:
    for number, (row, page, old) in enumerate(zip(rows.parts, pages.parts, before, strict=True)):
        wanted = old.clone()
        if number in parts:
            wanted[TARGETS] = row[SOURCES]
        assert torch.equal(page, wanted), f"part {number}"


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("sizes", [ALIKE, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize("path", [None, Path.STAGED, Path.DMA], ids=str)
def test_each_group_brings_its_parts_and_no_others(path: Path | None, sizes: list[int]) -> None:
    rows, pages = views(sizes)
    machine = None if path is None else FakeMachine()
    layered = LayeredCopy(rows, pages, machine, None if path is None else lambda case: Choice(path))
    before = [page.clone() for page in pages.parts]
    copies = layered.copies(SOURCES, TARGETS)
    assert len(copies) == 4
    for group, copy in enumerate(copies):
        copy()
        assert_copied(rows, pages, before, range(2 * (group + 1)))


def test_what_is_too_small_or_wrong_makes_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, pages = views(ALIKE)
    assert not prepare_layers(rows, pages).copies(SOURCES, TARGETS)
    monkeypatch.setattr("dynamo_kernels.layered._GROUP_BYTES", 1)
    layered = prepare_layers(rows, pages)
    assert not layered.copies([], [])
    with pytest.raises(CopyError, match="outside"):
        layered.copies([1], [BLOCKS])
    with pytest.raises(CopyError, match="twice"):
        layered.copies([1, 2], [3, 3])


def loads_and_layers(tape: Tape, sizes: list[int]) -> None:
    """Two loads one behind the other, the second into what is read meanwhile by nobody; every layer waits and reads."""
    machine = FakeMachine(tape)
    compute, copies = machine.compute, tape.stream()
    machine.current = lambda: copies  # type: ignore[method-assign]
    rows, pages = views(sizes)
    layered = LayeredCopy(rows, pages, machine, lambda case: Choice(Path.STAGED))
    stream = LayerStream(CPU, len(sizes), copies)

    def bytes_of(part: int) -> list[int]:
        page = pages.parts[part]
        return [int(page[block].data_ptr()) + at for block in range(BLOCKS) for at in range(0, page.shape[1], 16)]

    compute.work("step before", reads=[at for part in range(len(sizes)) for at in bytes_of(part)])
    begun = ComputeFence(CPU, compute)
    for sources, targets in (([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]), ([7, 8, 9], [1, 2, 3])):
        stream.start(begun, layered.copies(sources, targets))
    for part in range(len(sizes)):
        stream.wait(part, compute)
        compute.work(f"attention {part}", reads=bytes_of(part))
    stream.join(compute)
    assert not stream.is_open


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("sizes", [ALIKE, MIXED], ids=["alike", "mixed"])
def test_loads_by_layers_race_with_nothing_not_even_over_their_buffers(sizes: list[int]) -> None:
    tape = Tape()
    loads_and_layers(tape, sizes)
    assert tape.races() == []


def waits(ask: Callable[[int], bool], tape: Tape) -> list[tuple[str, str]]:
    """One load of four groups over eight parts; those layers wait that `ask`. What follows the step may read all."""
    compute, copies = tape.stream(), tape.stream()
    stream = LayerStream(CPU, 8, copies)
    compute.work("step before", reads=range(8))
    begun = ComputeFence(CPU, compute)
    groups = [range(2 * group, 2 * group + 2) for group in range(4)]
    stream.start(begun, [lambda parts=parts: copies.work(f"load {parts[0]}", writes=parts) for parts in groups])
    compute.work("new tokens' KV, in other blocks", writes=["elsewhere"])
    for part in range(0, 8, 2):
        if ask(part):
            stream.wait(part, compute)
            compute.work(f"attention {part}", reads=[part, part + 1])
    stream.join(compute)
    compute.work("what follows", reads=range(8))
    return tape.races()


def test_each_layer_needs_its_own_wait() -> None:
    whole = Tape()
    assert waits(lambda part: True, whole) == []
    missed = [set(waits(lambda part: True, Tape(ignore_wait=number))) for number in range(whole.waits)]
    begun, *layers, end = missed
    assert ("step before", "load 0") in begun
    assert layers == [{(f"load {part}", f"attention {part}")} for part in range(0, 8, 2)]
    assert end == set(), "the last layer has waited for all"


def test_what_no_layer_waited_for_is_joined_before_anything_else() -> None:
    for asked in ({0, 2}, set[int]()):
        whole = Tape()
        assert waits(asked.__contains__, whole) == []
        without_join = waits(asked.__contains__, Tape(ignore_wait=whole.waits - 1))
        assert [first for first, _ in without_join] == [f"load {part}" for part in range(0, 8, 2) if part not in asked]


def test_an_error_in_a_later_group_leaves_nothing_to_wait_for() -> None:
    tape = Tape()
    stream = LayerStream(CPU, 8, tape.stream())

    def broken() -> None:
        raise CopyError("no such kernel")

    with pytest.raises(CopyError):
        stream.start(ComputeFence(CPU, tape.stream()), [lambda: None, broken])
    assert not stream.is_open
