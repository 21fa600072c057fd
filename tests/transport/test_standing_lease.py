"""Scenes of blocks that are read because they lie there, not because somebody keeps them."""

from __future__ import annotations

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport.messages import STANDING_LEASE
from tests.transport.test_protocol import A, B, C, land
from tests.transport.world import NAMESPACE, World, talk


def fetching(keys: list[BlockKey]) -> tuple[World, int]:
    """Nothing is exported; A and B lie in slots 0 and 1."""
    world = World()
    for slot, key in enumerate((A, B)):
        world.memory.begin_fill(slot)
        world.memory.end_fill(slot, key)
    number = world.read(STANDING_LEASE, keys, 8.0)
    talk(world)
    return world, number


def test_what_an_owner_happens_to_hold_can_be_read_under_the_standing_lease() -> None:
    world, number = fetching([B, C, A])
    land(world)
    talk(world)
    assert world.asked[number].reasons == (None, "gone", None)
    assert world.asked[number].buffers == {0: B, 2: A}
    assert world.owner.open_leases == 0
    world.pass_time(60.0)
    again = world.read(STANDING_LEASE, [A], 8.0)
    talk(world)
    land(world)
    talk(world)
    assert world.asked[again].reasons == (None,), "it never ends"


def test_a_block_that_is_evicted_under_a_fetch_is_stale() -> None:
    world, number = fetching([A])
    world.memory.begin_fill(0)
    world.memory.end_fill(0, B)
    land(world)
    talk(world)
    assert world.asked[number].reasons == ("stale",)


def test_a_guess_where_a_block_lies_is_looked_at_twice() -> None:
    world, _ = fetching([])
    world.memory.guesses[C] = 1
    number = world.read(STANDING_LEASE, [C], 8.0)
    talk(world)
    assert world.asked[number].reasons == ("gone",)


def test_an_owner_that_was_reset_serves_nothing_of_before_under_the_standing_lease() -> None:
    world, number = fetching([A])
    world.owner.isolate(b"another", NAMESPACE)
    land(world)
    talk(world)
    assert world.asked[number].reasons == ("stale",)


def test_an_owner_without_a_shelf_knows_no_standing_lease() -> None:
    world = World()
    world.owner._shelf = None
    world.memory.begin_fill(0)
    world.memory.end_fill(0, A)
    number = world.read(STANDING_LEASE, [A], 8.0)
    world.settle()
    assert world.asked[number].reasons == ("gone",)
