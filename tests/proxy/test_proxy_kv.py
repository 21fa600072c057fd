"""The KV index against a naive model, and event decoding in both dialects."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from dynamo_proxy.block_hash import block_hash, root_hash, token_chain
from dynamo_proxy.compact_map import CompactMap
from dynamo_proxy.errors import EventDecodeError
from dynamo_proxy.kv_events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Order,
    SequenceTracker,
    decode_batch,
)
from dynamo_proxy.kv_index import KvIndex, Outcome
from dynamo_proxy.prefix_walk import leading_runs
from hypothesis import given
from hypothesis import strategies as st

encode = msgspec.msgpack.encode
ROOT = root_hash("", "")


def stored(
    hashes: list[Any], parent: Any, tokens: list[int], size: int = 2, medium: str = "GPU", **extra: Any
) -> BlocksStored:
    raw = {
        "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens,
        "block_size": size, "lora_id": None, "medium": medium, "lora_name": None, **extra,
    }  # fmt: skip
    (event,), _ = decode_batch(encode([1.0, [raw], 0]))
    assert isinstance(event, BlocksStored)
    return event


def removed(hashes: list[Any], medium: str = "GPU") -> BlocksRemoved:
    return BlocksRemoved(tuple(hashes), medium, 0)


# --- decoding


def test_maps_and_arrays_decode_to_the_same_events() -> None:
    maps = [
        {"type": "BlockStored", "block_hashes": [7, 8], "parent_block_hash": None, "token_ids": [1, 2, 3, 4],
         "block_size": 2, "lora_id": None, "medium": "GPU", "session_id": "s"},
        {"type": "BlockRemoved", "block_hashes": [7], "medium": "CPU_PINNED"},
        {"type": "AllBlocksCleared"},
    ]  # fmt: skip
    arrays = [
        ["BlockStored", [7, 8], None, [1, 2, 3, 4], 2, None, "GPU"],
        ["BlockRemoved", [7], "CPU_PINNED"],
        ["AllBlocksCleared"],
    ]
    assert decode_batch(encode([1.0, maps, 0])) == decode_batch(encode([1.0, arrays]))
    events, unknown = decode_batch(encode([1.0, [*arrays, ["Novelty", 1], {"type": "Other"}]]))
    assert [type(event) for event in events] == [BlocksStored, BlocksRemoved, AllCleared]
    assert unknown == 2


def test_short_arrays_of_older_engines_decode() -> None:
    (event, gone), _ = decode_batch(
        encode([1.0, [["BlockStored", [b"\x01"], None, [5, 6], 2, None], ["BlockRemoved", [3]]]])
    )
    assert isinstance(event, BlocksStored)
    assert (event.medium, event.block_hashes) == ("GPU", (b"\x01",))
    assert isinstance(gone, BlocksRemoved)
    assert gone.medium == "GPU"


def test_salt_and_lora_name_the_tree_in_every_version() -> None:
    tagged = stored([1], None, [1, 2], lora_name="ad", extra_keys=[["ad", ["cache_salt", "S"]]])
    plain = stored([1], None, [1, 2], lora_name="ad", extra_keys=[["ad", "S"]])
    sglang = stored([1], None, [1, 2], lora_name="ad", cache_salt="S")
    assert [(event.lora_name, event.cache_salt, event.extra) for event in (tagged, plain, sglang)] == [
        ("ad", "S", ())
    ] * 3
    image = stored([1, 2], None, [1, 2, 3, 4], extra_keys=[None, [["img", 0]]])
    assert (image.cache_salt, image.extra[0], bool(image.extra[1])) == ("", b"", True)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\xc1", "not_msgpack"),
        (b"", "not_msgpack"),
        (encode({"a": 1}), "bad_batch"),
        (encode([1.0, "x"]), "bad_batch"),
        (encode([1.0, [5]]), "bad_event"),
        (encode([1.0, [["BlockStored", 5]]]), "bad_event"),
        (encode([1.0, [["BlockStored", [1], None, [1, 2, 3], 2, None]]]), "bad_event"),
        (encode([1.0, [["BlockStored", [1], None, [1, "x"], 2, None]]]), "bad_event"),
        (encode([1.0, [["BlockStored", [1], 1.5, [1, 2], 2, None]]]), "bad_event"),
        (encode([1.0, [["BlockRemoved", "x"]]]), "bad_event"),
    ],
)
def test_what_cannot_be_read_is_named(payload: bytes, reason: str) -> None:
    with pytest.raises(EventDecodeError) as caught:
        decode_batch(payload)
    assert caught.value.reason == reason


@given(st.binary(max_size=100))
def test_no_payload_fails_otherwise_than_by_decode_error(payload: bytes) -> None:
    with contextlib.suppress(EventDecodeError):
        decode_batch(payload)


def test_sequence_numbers() -> None:
    tracker = SequenceTracker()
    assert tracker.classify(0) is Order.NEXT
    tracker.accept(4)
    assert [tracker.classify(number) for number in (5, 6, 0, 4)] == [
        Order.NEXT,
        Order.GAP,
        Order.RESTART,
        Order.RESTART,
    ]
    tracker.check()


# --- the exact index


def test_a_stored_chain_is_found_by_tokens_and_continued_by_its_parent() -> None:
    index = KvIndex()
    assert index.apply(3, 0, stored([11, 12], None, [1, 2, 3, 4])) is Outcome.APPLIED
    assert index.apply(3, 0, stored([13], 12, [5, 6])) is Outcome.APPLIED
    assert index.walk(token_chain([1, 2, 3, 4, 5, 6, 7, 8], 2, ROOT), 1 << 3) == {3: 3}
    assert index.walk(token_chain([1, 2, 9, 9], 2, ROOT), 1 << 3) == {3: 1}
    assert index.walk(token_chain([1, 2], 2, root_hash("lora", "")), 1 << 3) == {}
    assert index.apply(3, 0, stored([20], 99, [5, 6])) is Outcome.UNKNOWN_PARENT
    assert index.block_tokens(3) == 2
    index.check()


def test_a_block_is_held_while_any_medium_holds_it() -> None:
    index = KvIndex()
    chain = token_chain([1, 2], 2, ROOT)
    index.apply(0, 0, stored([11], None, [1, 2]))
    index.apply(0, 0, stored([11], None, [], medium="CPU"))
    assert index.media(0, chain[0]) == 3
    index.apply(0, 0, removed([11]))
    assert index.walk(chain, 1) == {0: 1}
    index.apply(0, 0, removed([11], "CPU_PINNED"))
    assert index.walk(chain, 1) == {}
    assert len(index) == 0
    assert index.apply(0, 0, removed([11])) is Outcome.UNKNOWN_BLOCK
    index.check()


def test_ranks_are_caches_of_their_own_and_numbers_are_used_again() -> None:
    index = KvIndex()
    chain = token_chain([1, 2, 3, 4, 5, 6], 2, ROOT)
    index.apply(0, 0, stored([11, 12], None, [1, 2, 3, 4]))
    index.apply(0, 1, stored([11, 12, 13], None, [1, 2, 3, 4, 5, 6]))
    index.apply(1, 0, stored([11], None, [1, 2]))
    assert index.walk(chain, 0b11) == {0: 3, 1: 1}
    assert index.walk(chain, 0b10) == {1: 1}
    index.clear_source(0, 1)
    assert index.walk(chain, 0b11) == {0: 2, 1: 1}
    index.apply(0, 2, stored([11], None, [1, 2], medium="CPU"))
    index.clear_source(0, 0)
    index.check()
    assert (index.walk(chain, 0b11), index.media(0, chain[0]), index.held_blocks(0)) == ({0: 1, 1: 1}, 2, 1)
    index.apply(0, 0, stored([11, 12], None, [1, 2, 3, 4]))
    index.check()
    assert index.walk(chain, 0b11) == {0: 2, 1: 1}
    index.clear(0)
    index.clear(1)
    assert len(index) == 0
    index.check()


def test_a_long_hash_is_the_number_that_the_engine_would_tell() -> None:
    index = KvIndex()
    long = bytes(range(32))
    index.apply(0, 0, stored([long], None, [1, 2]))
    index.apply(0, 0, removed([int.from_bytes(long, "big") & (1 << 64) - 1]))
    assert len(index) == 0


@given(st.lists(st.tuples(st.sampled_from(("put", "pop")), st.integers(0, 4000), st.integers(1, (1 << 64) - 1))))
def test_the_compact_map_is_a_dict(script: list[tuple[str, int, int]]) -> None:
    compact, plain = CompactMap(), dict[int, int]()
    for action, key, value in script:
        assert compact.get(key) == plain.get(key, 0)
        if action == "put":
            assert compact.put(key, value) == plain.get(key, 0)
            plain[key] = value
        else:
            assert compact.pop(key) == plain.pop(key, 0)
        compact.check()
    assert dict(compact.items()) == plain
    assert sorted(compact.values()) == sorted(plain.values())
    assert len(compact) == len(plain)


def test_ranks_hold_for_their_engine_and_a_window_group_does_not_count() -> None:
    index = KvIndex()
    chain = token_chain([1, 2], 2, ROOT)
    for rank in (0, 1):
        index.apply(0, rank, stored([11], None, [1, 2]))
    window = stored([11], None, [1, 2], group_idx=1, kv_cache_spec_sliding_window=128)
    assert index.apply(0, 0, window) is Outcome.WINDOW_GROUP
    assert index.apply(0, 0, BlocksRemoved((11,), "GPU", 1)) is Outcome.WINDOW_GROUP
    index.apply(0, 0, removed([11]))
    assert index.walk(chain, 1) == {0: 1}
    index.apply(0, 1, AllCleared())
    assert index.walk(chain, 1) == {}
    index.check()


@pytest.mark.parametrize("kind", ["mamba", "chunked_local_attention", "sliding_window_mla", "of next year"])
def test_groups_that_no_prefix_hit_hangs_on_neither_add_nor_remove(kind: str) -> None:
    index = KvIndex()
    chain = token_chain([1, 2], 2, ROOT)
    index.apply(0, 0, stored([11], None, [1, 2], group_idx=0, kv_cache_spec_kind="full_attention"))
    state = stored([11], None, [1, 2], group_idx=1, kv_cache_spec_kind=kind)
    assert index.apply(0, 0, state) is Outcome.WINDOW_GROUP
    assert index.apply(0, 0, BlocksRemoved((11,), "GPU", 1)) is Outcome.WINDOW_GROUP
    assert index.walk(chain, 1) == {0: 1}
    index.check()


def test_a_tiers_events_have_no_group_and_are_not_taken_for_those_of_group_0() -> None:
    index = KvIndex()
    chain = token_chain([1, 2], 2, ROOT)
    index.apply(0, 0, stored([11], None, [1, 2], group_idx=0, kv_cache_spec_sliding_window=128))
    index.apply(0, 0, stored([11], None, [1, 2], medium="CPU"))
    assert index.walk(chain, 1) == {0: 1}
    (gone,) = decode_batch(
        msgspec.msgpack.encode([0.0, [{"type": "BlockRemoved", "block_hashes": [11], "medium": "CPU"}]])
    )[0]
    assert index.apply(0, 0, gone) is Outcome.APPLIED
    assert index.walk(chain, 1) == {}


def test_only_a_first_block_can_carry_a_salt() -> None:
    (event,) = [stored([2], 1, [3, 4], extra_keys=[["digest"]])]
    assert event.cache_salt == ""
    assert event.extra == (msgspec.msgpack.encode(["digest"]),)


def test_our_connectors_events_one_block_each_follow_a_block_through_its_media() -> None:
    index = KvIndex()
    chain = token_chain([1, 2, 3, 4], 2, root_hash("ad", "S"))
    index.apply(0, 0, stored([11, 12], None, [1, 2, 3, 4], lora_name="ad", extra_keys=[["ad", "S"], ["ad"]]))
    index.apply(0, 0, stored([11], None, [1, 2], medium="CPU", lora_name="ad", extra_keys=[["ad", "S"]]))
    index.apply(0, 0, stored([12], 11, [3, 4], medium="CPU", lora_name="ad", extra_keys=[["ad"]]))
    for number in (12, 11):
        index.apply(0, 0, removed([number]))
    assert index.walk(chain, 1) == {0: 2}
    index.apply(0, 0, stored([12], 11, [3, 4], medium="STORAGE", lora_name="ad", extra_keys=[["ad"]]))
    index.apply(0, 0, removed([12], "CPU"))
    assert index.walk(chain, 1) == {0: 2}
    index.apply(0, 0, removed([12], "STORAGE"))
    assert index.walk(chain, 1) == {0: 1}
    index.check()


def test_every_tier_has_a_bit_of_its_own_and_a_run_of_its_own() -> None:
    index = KvIndex()
    tokens = list(range(200))
    chain = token_chain(tokens, 2, ROOT)
    index.apply(0, 0, stored(list(range(100)), None, tokens))
    assert index.tier_runs(0, chain, 100) == (100, 100, 100, 100)
    for medium, first in (("CPU", 30), ("STORAGE", 50), ("EXTERNAL", 70)):
        index.apply(0, 0, stored(list(range(first, 100)), first - 1, tokens[2 * first :], medium=medium))
    index.apply(0, 0, removed(list(range(30, 100))))
    index.apply(0, 0, removed(list(range(50, 100)), "CPU"))
    index.apply(0, 0, removed(list(range(70, 100)), "DISK"))  # vLLM's name for G3 or SGLang's: one tier
    assert index.walk(chain, 1) == {0: 100}
    assert index.tier_runs(0, chain, 100) == (30, 50, 70, 100)
    index.apply(0, 0, removed(list(range(70, 100)), "STORAGE"))
    assert index.walk(chain, 1) == {0: 100}, "G3 lost it, G4 still has it"
    index.apply(0, 0, removed(list(range(70, 100)), "EXTERNAL"))
    assert index.walk(chain, 1) == {0: 70}
    index.apply(0, 0, stored([0], None, [0, 1], medium="OF NEXT YEAR"))
    index.apply(0, 0, removed([0], "EXTERNAL"))
    assert index.media(0, chain[0]) == 1 | 16
    index.check()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(0, 300))
def test_strides_find_what_a_plain_walk_finds(depths: list[int], asked: int) -> None:
    chain = list(range(1000, 1300))
    holders: dict[int, int] = {}
    for slot, depth in enumerate(depths):
        for node in chain[:depth]:
            holders[node] = holders.get(node, 0) | 1 << slot
    expected = {slot: min(depth, asked) for slot, depth in enumerate(depths) if min(depth, asked)}
    assert leading_runs(holders, chain[:asked], (1 << len(depths)) - 1) == expected


def test_the_index_is_bounded() -> None:
    index = KvIndex(max_blocks_per_source=3)
    outcomes = [index.apply(0, 0, stored([number], None, [number, number])) for number in range(5)]
    assert outcomes == [Outcome.APPLIED] * 3 + [Outcome.FULL] * 2
    index.check()


# Random prompts over a two-letter alphabet share many prefixes.
paths = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple)
media = st.sampled_from(["GPU", "CPU", "STORAGE", "EXTERNAL"])
steps = st.lists(
    st.tuples(st.sampled_from(["store", "store", "remove", "clear"]), st.integers(0, 2), paths, media),
    max_size=40,
)  # fmt: skip


@given(steps)
def test_the_index_agrees_with_a_naive_model(script: list[tuple[str, int, tuple[int, ...], str]]) -> None:
    index = KvIndex()
    naive: dict[int, dict[tuple[int, ...], set[str]]] = {slot: {} for slot in range(3)}

    def name(prefix: tuple[int, ...]) -> int:
        return int("1" + "".join(map(str, prefix)))

    for action, slot, path, medium in script:
        held = naive[slot]
        if action == "clear":
            index.apply(slot, 0, AllCleared())
            held.clear()
        elif action == "remove":
            index.apply(slot, 0, removed([name(path)], medium))
            if path in held:
                held[path].discard(medium)
                if not held[path]:
                    del held[path]
        else:
            start = 0
            while start < len(path) and path[: start + 1] in held:
                start += 1
            start = min(start, len(path) - 1)
            parent = name(path[:start]) if start else None
            hashes = [name(path[: depth + 1]) for depth in range(start, len(path))]
            index.apply(slot, 0, stored(hashes, parent, list(path[start:]), size=1, medium=medium))
            for depth in range(start, len(path)):
                held.setdefault(path[: depth + 1], set()).add(medium)
        index.check()
        chain = token_chain(path, 1, ROOT)
        expected = {}
        for other, blocks in naive.items():
            depth = 0
            while depth < len(path) and path[: depth + 1] in blocks:
                depth += 1
            if depth:
                expected[other] = depth
        assert index.walk(chain, 0b111) == expected


def test_chained_hashes_are_the_blocks_hashes() -> None:
    first = block_hash(ROOT, (1, 2))
    assert token_chain([1, 2, 3, 4, 5], 2, ROOT) == [first, block_hash(first, (3, 4))]
