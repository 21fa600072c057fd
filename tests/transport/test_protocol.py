"""Scenes of the protocol, each played on purpose: who says what when, and what the reader makes of it."""

from __future__ import annotations

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport.messages import Check, Grant, Hello, Refuse, Verdict, Welcome
from dynamo_connectors.transport.reader import Reader
from dynamo_connectors.transport.reader_state import Finish
from tests.transport.world import NAMESPACE, PEER, ROW_BYTES, World, talk

A, B, C = BlockKey(b"a"), BlockKey(b"b"), BlockKey(b"c")
LEASE, OTHER = b"l" * 16, b"o" * 16


def reading(keys: list[BlockKey], seconds: float = 8.0, has_words: bool = True) -> tuple[World, int]:
    """A world in which a READ of these keys has been posted and nothing of it has landed."""
    world = World(has_words=has_words)
    world.export(LEASE, [A, B, C], [0, 1, 2])
    number = world.read(LEASE, keys, seconds)
    talk(world)
    assert len(world.transfers) == 1
    return world, number


def land(world: World) -> None:
    while world.transfers:
        world.progress(0)


def test_a_read_is_loaded_after_the_owner_has_confirmed_it() -> None:
    world, number = reading([C, A], has_words=False)
    land(world)
    assert world.asked[number].reasons is None, "nothing is loaded before the verdict"
    talk(world)
    assert world.asked[number].reasons == (None, None)
    assert world.asked[number].buffers == {0: C, 1: A}


def test_blocks_that_the_lease_does_not_hold_are_missing_alone() -> None:
    world, number = reading([A, BlockKey(b"stranger")])
    land(world)
    talk(world)
    assert world.asked[number].reasons == (None, "gone")


def test_a_lease_that_expired_before_the_question_gives_nothing() -> None:
    """What vLLM's own connector answers with another prompt's KV (its issue 21570)."""
    world = World()
    world.export(LEASE, [A], [0])
    world.pass_time(3.5)
    assert not world.pinned
    world.memory.begin_fill(0)
    world.memory.end_fill(0, B)
    number = world.read(LEASE, [A], 8.0)
    talk(world)
    assert world.asked[number].reasons == ("gone",)


def test_expiry_waits_for_a_read_that_was_granted() -> None:
    world, number = reading([A])
    world.now += 5.0
    world.owner.expire(world.now)
    world.collect()
    assert LEASE in world.pinned
    land(world)
    talk(world)
    assert world.asked[number].reasons == (None,)


def test_a_slot_filled_anew_under_a_read_is_stale_even_with_the_same_key() -> None:
    world, number = reading([A])
    world.memory.begin_fill(0)
    world.progress(0)  # torn bytes land
    world.memory.end_fill(0, A)
    land(world)
    talk(world)
    assert world.asked[number].reasons == ("stale",)
    assert world.reader.counts["nixl_fences_refused", "other_generation"] == 1


def test_blocks_that_the_owner_forgot_under_a_read_are_stale() -> None:
    world, number = reading([A])
    world.owner.revoke_all()
    world.collect()
    land(world)
    talk(world)
    assert world.asked[number].reasons == ("stale",)


def test_without_the_fence_the_same_scene_hands_out_foreign_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker has teeth: a reader that believes its READ is caught."""

    def believe(reader: Reader, number: int, error: str | None, now: float, words: object = ()) -> None:
        reader._finish(reader._reads[number], error)

    monkeypatch.setattr(Reader, "transfer_ended", believe)
    world, _ = reading([A])
    world.memory.begin_fill(0)
    world.memory.end_fill(0, B)
    land(world)
    with pytest.raises(AssertionError, match="foreign bytes"):
        world.check()


def test_an_answer_to_an_earlier_question_is_no_answer() -> None:
    """A verdict that came before the READ ended says nothing about it."""
    world, number = reading([A], has_words=False)
    world.reader.receive(PEER, Verdict(b"reader", number, world.epoch, True), world.now)
    world.obey()
    assert world.asked[number].reasons is None


def test_an_owner_that_was_restarted_has_nothing_of_its_last_run() -> None:
    world, number = reading([A])
    world.start_owner()
    land(world)
    talk(world)
    assert world.asked[number].reasons == ("stale",), "whatever it finds where the words were is not what they were"
    again = world.read(LEASE, [A], 8.0)
    talk(world)
    assert world.asked[again].reasons == ("restarted",)
    again = world.read(LEASE, [A], 8.0)
    talk(world)  # met anew under the same address
    assert world.asked[again].reasons is None
    world.export(LEASE, [A], [3])
    world.settle()
    assert world.asked[again].reasons == (None,)


@pytest.mark.parametrize("which", ["owner", "reader"])
def test_who_was_reset_meets_nobody_who_was_not(which: str) -> None:
    world = World()
    world.export(LEASE, [A], [0])
    first = world.read(LEASE, [A], 8.0)
    talk(world)
    if which == "owner":
        world.owner.isolate(b"new run", NAMESPACE + b"1")
        world.collect()
    else:
        world.reader.isolate(NAMESPACE + b"2")
        world.obey()
    assert world.asked[first].reasons is None, "a READ that is under way goes on"
    land(world)
    talk(world)
    assert world.asked[first].reasons == ("stale" if which == "owner" else "restarted",)
    world.export(OTHER, [B], [1])
    for said in ("restarted", "refused") if which == "owner" else ("refused",):
        again = world.read(OTHER, [B], 8.0)
        world.settle()
        assert world.asked[again].reasons == (said,)


def test_a_reset_ends_what_was_asked_before_it() -> None:
    world = World()
    world.export(LEASE, [A], [0])
    number = world.read(LEASE, [A], 8.0)
    world.deliver_to_owner(0)
    world.deliver_to_reader(0)
    world.reader.isolate(NAMESPACE + b"2")
    world.obey()
    assert world.asked[number].reasons == ("refused",)
    talk(world)
    assert not world.transfers


def test_answers_to_another_reader_are_no_answers() -> None:
    world, number = reading([A], has_words=False)
    land(world)
    world.reader.receive(PEER, Verdict(b"another", number, world.epoch, True), world.now)
    world.obey()
    assert world.asked[number].reasons is None
    assert world.reader.counts["nixl_refused_messages", "other_reader"] == 1


def test_a_welcome_of_another_namespace_is_no_welcome() -> None:
    world = World()
    world.read(LEASE, [A], 8.0)
    world.reader.receive(PEER, Welcome(1, b"other", world.epoch, b"metadata", 0, 6, ROW_BYTES), world.now)
    assert not world.reader.take()
    assert world.reader.counts["nixl_refused_messages", "other_namespace"] == 1


@pytest.mark.parametrize("is_late", [False, True])
def test_a_read_under_way_keeps_its_memory_when_its_owner_is_another_by_now(is_late: bool) -> None:
    """The question goes out twice; the first is granted, the second reaches the next run of the owner."""
    world = World()
    world.export(LEASE, [A], [0])
    number = world.read(LEASE, [A], 1.0)
    world.deliver_to_owner(0)
    world.deliver_to_reader(0)
    world.pass_time(0.1)
    assert len(world.to_owner) == 2, "the question is said again"
    world.deliver_to_owner(0)
    world.deliver_to_reader(0)
    assert len(world.transfers) == 1
    if is_late:
        world.pass_time(1.5)
    world.start_owner()
    talk(world)  # restarted, says the new run
    assert world.asked[number].reasons is None, "NIXL still writes to its rows"
    land(world)
    talk(world)
    assert world.asked[number].reasons == ("timeout" if is_late else "stale",)


def test_a_lease_nobody_ever_announces_is_waited_for_a_moment_only() -> None:
    world = World()
    number = world.read(OTHER, [A], 60.0)
    world.settle()
    assert world.asked[number].reasons == ("gone",)
    assert world.now < 3.0


def test_an_announced_lease_is_waited_for() -> None:
    world = World()
    world.owner.announce(LEASE, 0.0)
    number = world.read(LEASE, [A], 8.0)
    for _ in range(8):
        talk(world)
        world.pass_time(0.5)
    assert world.asked[number].reasons is None
    world.export(LEASE, [A], [0])
    world.settle()
    assert world.asked[number].reasons == (None,)


def test_a_lost_message_is_said_again() -> None:
    world = World()
    world.export(LEASE, [A], [0])
    number = world.read(LEASE, [A], 8.0)
    for step in range(40):
        if world.to_owner and step % 2 == 0:
            world.to_owner.pop(0)
        talk(world)
        land(world)
        world.pass_time(0.1)
    assert world.asked[number].reasons == (None,)


def test_a_late_read_keeps_its_memory_and_its_peer_gets_no_other() -> None:
    world, number = reading([A], seconds=1.0)
    world.pass_time(1.5)
    assert world.asked[number].reasons is None, "its memory is quarantined"
    assert world.reader.quarantined_bytes == ROW_BYTES
    other = world.read(LEASE, [B], 8.0)
    assert world.asked[other].reasons == ("unavailable",)
    land(world)
    assert world.asked[number].reasons == ("timeout",), "late bytes are not used"
    assert world.reader.quarantined_bytes == 0
    third = world.read(LEASE, [B], 8.0)
    world.settle()
    assert world.asked[third].reasons == (None,)


def test_more_late_bytes_than_the_budget_restart_the_data_plane() -> None:
    world = World(quarantine_bytes=2 * ROW_BYTES)
    world.export(LEASE, [A, B, C], [0, 1, 2])
    late = [world.read(LEASE, [A, B], 1.0), world.read(LEASE, [C], 1.0)]
    talk(world)
    world.pass_time(1.5)
    assert world.started_anew == 1
    assert [world.asked[number].reasons for number in late] == [("timeout", "timeout"), ("timeout",)]
    after = world.read(LEASE, [A], 8.0)
    world.settle()
    assert world.asked[after].reasons == (None,)


def test_a_silent_peer_costs_its_first_reader_a_while_and_the_next_one_nothing() -> None:
    world = World()
    first = world.read(LEASE, [A], 60.0)
    while world.asked[first].reasons is None:
        world.to_owner.clear()
        world.pass_time(0.5)
    assert world.now < 10
    assert world.asked[first].reasons == ("unreachable",)
    assert "--kvbm-peer-secret-file" in world.reader.complaints[0]
    second = world.read(LEASE, [A], 60.0)
    assert world.asked[second].reasons == ("unreachable",)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [(Hello(1, b"other", ROW_BYTES), "other_model"), (Hello(1, NAMESPACE, 99), "other_block_size")],
)
def test_peers_that_could_misread_each_other_are_refused_in_one_line(hello: Hello, reason: str) -> None:
    world = World()
    refusal = world.owner.receive(hello, 0.0)
    assert isinstance(refusal, Refuse)
    assert refusal.reason == reason
    assert "\n" not in refusal.detail
    assert world.owner.counts["nixl_refused_peers", reason] == 1
    number = world.read(LEASE, [A], 8.0)
    world.reader.receive(PEER, refusal, world.now)
    world.obey()
    assert world.asked[number].reasons == ("refused",)
    assert refusal.detail in world.reader.complaints[0]


def test_an_answer_that_does_not_fit_the_question_is_a_miss() -> None:
    world, _ = reading([A])
    world = World()
    world.export(LEASE, [A], [0])
    number = world.read(LEASE, [A], 8.0)
    world.deliver_to_owner(0)
    world.deliver_to_reader(0)
    for slots in ((0, 1), (10**6,)):
        grant = Grant(b"reader", number, world.epoch, "granted", slots, (1,) * len(slots))
        world.reader.receive(PEER, grant, world.now)
        world.obey()
    assert world.asked[number].reasons == ("bad_answer",)


def test_the_owner_does_not_look_outside_its_slots() -> None:
    world = World()
    world.export(LEASE, [A], [0])
    verdict = world.owner.receive(Check(b"r", 1, world.epoch, LEASE, (10**6,), (0,)), 0.0)
    assert verdict == Verdict(b"r", 1, world.epoch, False, "garbled")


def test_metadata_that_cannot_be_loaded_refuse_the_peer() -> None:
    world = World()
    number = world.read(LEASE, [A], 8.0)
    world.to_owner.clear()
    world.reader.receive(PEER, Welcome(1, NAMESPACE, world.epoch, b"trunc", 0, 6, ROW_BYTES), world.now)
    world.reader.take()
    world.reader.connected(PEER, world.epoch, "the metadata is truncated", world.now)
    assert [step for step in world.reader.take() if isinstance(step, Finish)] == [Finish(number, ("refused",))]
    world.asked[number].reasons = ("refused",)


def test_a_watched_lease_lives_until_its_request_lets_go() -> None:
    world = World()
    world.export(LEASE, [A], [0])
    world.reader.watch(PEER, LEASE, world.now)
    world.obey()
    for _ in range(20):
        talk(world)
        world.pass_time(1.0)
        if world.now > 15:
            break
    # Renewed every five seconds; this owner's leases live three.
    assert world.owner.counts["nixl_leases_ended", "expired"] == 1
    world.export(OTHER, [B], [1])
    world.reader.watch(PEER, OTHER, world.now)
    world.reader.unwatch(OTHER, world.now)
    world.obey()
    talk(world)
    assert OTHER not in world.pinned
    assert world.owner.counts["nixl_leases_ended", "done"] == 1
