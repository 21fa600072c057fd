"""Which work may overtake which: the checker itself, our streams under it, and each wait taken away in turn."""

from __future__ import annotations

import pytest
import torch
from dynamo_kernels import BlockView, ComputeFence, CopyLane, SideStream
from dynamo_kernels.choices import Choice, Direction, Path
from dynamo_kernels.plan import CopyPlan

from tests.kernels.fake_machine import FakeMachine
from tests.kernels.stream_order import Tape

CPU = torch.device("cpu")


def test_streams_are_unordered_until_one_waits() -> None:
    tape = Tape()
    one, other = tape.stream(), tape.stream()
    one.work("write", writes=["b"])
    other.work("early read", reads=["b"])
    other.wait_event(one.record_event())
    other.work("late read", reads=["b"])
    one.work("read elsewhere", reads=["c"])
    assert tape.races() == [("write", "early read")]


def test_an_event_holds_what_came_before_it_only() -> None:
    tape = Tape()
    one, other = tape.stream(), tape.stream()
    event = one.record_event()
    one.work("write", writes=["b"])
    other.wait_event(event)
    other.work("read", reads=["b"])
    assert tape.races() == [("write", "read")]


def test_order_goes_through_a_third_stream_and_through_the_host() -> None:
    tape = Tape()
    one, two, three = tape.stream(), tape.stream(), tape.stream()
    one.work("write", writes=["b"])
    two.wait_stream(one)
    three.wait_stream(two)
    three.work("read", reads=["b"])
    three.synchronize()
    tape.stream().work("write again", writes=["b"])
    assert tape.races() == []


def test_two_readers_do_not_race_and_two_writers_do() -> None:
    tape = Tape()
    for number in range(2):
        tape.stream().work(f"read {number}", reads=["b"])
    assert tape.races() == []
    for number in range(2):
        tape.stream().work(f"write {number}", writes=["b"])
    assert len(tape.races()) == 5


def a_store_and_a_load(tape: Tape, choice: Choice) -> FakeMachine:
    """What the connector does: compute writes blocks, they are stored, loaded elsewhere and read."""
    machine = FakeMachine(tape)
    machine_compute = machine.compute
    copies = tape.stream()
    machine.current = lambda: copies  # type: ignore[method-assign]
    pages = torch.randint(0, 255, (3, 40, 128), dtype=torch.uint8)
    rows = torch.zeros((40, 3 * 128), dtype=torch.uint8)
    hbm = BlockView.of_pages(pages.unbind(0), [128] * 3)
    host = BlockView.of_rows(rows, [128] * 3)
    store = CopyPlan(hbm, host, Direction.D2H, machine, lambda case: choice)
    load = CopyPlan(host, hbm, Direction.H2D, machine, lambda case: choice)
    stored, freed = list(range(20)), list(range(20, 40))

    def touches(blocks: list[int]) -> list[int]:
        return [int(part[block].data_ptr()) + at for part in hbm.parts for block in blocks for at in range(0, 128, 16)]

    machine_compute.work("prefill", writes=touches(stored))
    machine_compute.work("last read of freed blocks", reads=touches(freed))
    fence = ComputeFence(CPU, machine_compute)
    with CopyLane(CPU, fence, copies):
        store.enqueue(stored, stored[::-1])
    machine_compute.work("blocks stored are used again", writes=touches(stored))
    with CopyLane(CPU, ComputeFence(CPU, machine_compute), copies):
        load.enqueue(stored, freed)
    machine_compute.work("attention", reads=touches(freed))
    return machine


CHOICES = [Choice(Path.DMA), Choice(Path.ZERO_COPY), Choice(Path.SPLIT, 1, 0.5), Choice(Path.STAGED)]


@pytest.fixture(autouse=True)
def _small_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_kernels.plan._STAGING_BYTES", 4 * 3 * 128)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.path.value)
def test_stores_and_loads_never_race_with_compute(choice: Choice) -> None:
    tape = Tape()
    a_store_and_a_load(tape, choice)
    assert tape.races() == []


def without_each_wait(choice: Choice) -> dict[int, list[tuple[str, str]]]:
    whole = Tape()
    a_store_and_a_load(whole, choice)
    found = {}
    for number in range(whole.waits):
        tape = Tape(ignore_wait=number)
        a_store_and_a_load(tape, choice)
        found[number] = tape.races()
    return found


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.path.value)
def test_a_store_that_does_not_wait_for_compute_is_caught(choice: Choice) -> None:
    races = without_each_wait(choice)[0]  # the store's lane holds for the fence
    assert any(first == "prefill" for first, _ in races)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.path.value)
def test_attention_that_does_not_wait_for_the_load_is_caught(choice: Choice) -> None:
    races = without_each_wait(choice)
    assert any(second == "attention" for _, second in races[max(races)])  # the load's lane is awaited last


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.path.value)
def test_what_the_current_stream_gets_next_follows_a_copy_that_nobody_waited_for(choice: Choice) -> None:
    def ahead(tape: Tape) -> list[tuple[str, str]]:
        machine = FakeMachine(tape)
        pages, rows = torch.zeros((3, 20, 128), dtype=torch.uint8), torch.zeros((20, 3 * 128), dtype=torch.uint8)
        hbm, host = BlockView.of_pages(pages.unbind(0), [128] * 3), BlockView.of_rows(rows, [128] * 3)
        every = [int(part.data_ptr()) + at for part in hbm.parts for at in range(0, 20 * 128, 16)]
        machine.compute.work("last read of freed blocks", reads=every)
        load = CopyPlan(host, hbm, Direction.H2D, machine, lambda case: choice)
        load.enqueue(list(range(20)), list(range(20)))
        machine.compute.work("attention", reads=every)
        return tape.races()

    whole = Tape()
    assert ahead(whole) == []
    races = [race for number in range(whole.waits) for race in ahead(Tape(ignore_wait=number))]
    # Staged, the kernels that write blocks wait for the engines too, which have waited for compute.
    needed = {"attention"} if choice.path is Path.STAGED else {"last read of freed blocks", "attention"}
    assert needed <= {name for race in races for name in race}


def test_a_copy_beside_the_step_is_ordered_after_the_one_before_and_before_the_next_one() -> None:
    def beside(tape: Tape) -> list[tuple[str, str]]:
        compute, copies = tape.stream(), tape.stream()
        side = SideStream(CPU, copies)
        compute.work("step before", reads=["b"])
        begun = ComputeFence(CPU, compute)
        with side.after(begun):
            copies.work("load", writes=["b"])
        compute.work("this step", reads=["c"])
        side.join(compute)
        compute.work("next step", reads=["b"])
        side.join(compute)
        return tape.races()

    whole = Tape()
    assert beside(whole) == []
    assert whole.waits == 2, "nothing is waited for twice"
    missed = [race for number in range(whole.waits) for race in beside(Tape(ignore_wait=number))]
    assert missed == [("step before", "load"), ("load", "next step")]


def test_every_wait_of_the_staging_ring_is_needed() -> None:
    """Filled before it is emptied, emptied before it is filled again: of 5 rounds over 2 buffers, both directions."""
    races = without_each_wait(Choice(Path.STAGED))
    inside = [
        number for number, found in races.items() if any("direct" in a + b and "fragments" in a + b for a, b in found)
    ]
    assert len(inside) == 2 * (5 + 3)
