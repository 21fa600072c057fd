"""Waiting for somebody else's load: together, never for ever, never for a load that helps nobody."""

from __future__ import annotations

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.vllm.sharing import SharedLoads

A, B, C = (BlockKey(name) for name in (b"a", b"b", b"c"))


def test_all_who_want_a_block_that_is_being_loaded_wait_and_go_on_together() -> None:
    shared = SharedLoads()
    assert not shared.must_wait("first", A)
    shared.begin("first", [A, B])
    assert all(shared.must_wait(f"waiter{number}", A) for number in range(40))
    assert shared.must_wait("waiter0", A)
    assert shared.num_waits == 40
    assert not shared.must_wait("other", C)
    shared.end("first")
    assert not any(shared.must_wait(f"waiter{number}", A) for number in range(40))


def test_a_loader_that_leaves_frees_its_waiters() -> None:
    shared = SharedLoads()
    shared.begin("first", [A])
    assert shared.must_wait("second", A)
    shared.leave("first")
    shared.end("first")
    assert not shared.must_wait("second", A)


def test_a_waiter_whose_loaders_keep_failing_loads_for_itself() -> None:
    shared = SharedLoads()
    for loader in ("one", "two"):
        shared.begin(loader, [A])
        assert shared.must_wait("waiter", A)
        shared.end(loader)
    shared.begin("three", [A])
    assert not shared.must_wait("waiter", A)
    shared.begin("waiter", [A])
    shared.end("three")
    assert not shared.must_wait("late", A)
    shared.leave("waiter")


def test_who_waited_for_a_load_that_was_late_has_no_time_for_another() -> None:
    shared = SharedLoads()
    shared.begin("first", [A])
    assert shared.must_wait("waiter", A)
    shared.end("first", is_late=True)
    assert shared.is_out_of_time("waiter")
    assert not shared.is_out_of_time("other")
    shared.leave("waiter")
    assert not shared.is_out_of_time("waiter")


def test_the_block_stays_with_its_first_loader() -> None:
    shared = SharedLoads()
    shared.begin("first", [A])
    shared.begin("second", [A, B])
    shared.end("second")
    assert shared.must_wait("third", A)
    assert not shared.must_wait("third", B)
