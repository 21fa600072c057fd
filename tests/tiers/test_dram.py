"""What only the DRAM store has: keys without bytes, pinning, and views that outlive it."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.tiers.dram import DramStore

ROW = 1000
GIGABYTE = 1 << 30
A, B = (BlockKey(letter.encode() * 32) for letter in "ab")


def mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def test_a_row_is_served_only_under_the_key_it_was_named() -> None:
    store = DramStore(2, ROW)
    store.rows[1] = 7
    into = memoryview(bytearray(ROW))
    for key, held in ((None, False), (B, False), (A, True)):
        store.set_key(1, key)
        assert store.holds(1, A) == held
    store.read(1, A, into)
    assert bytes(into) == b"\x07" * ROW
    store.set_key(1, None)
    with pytest.raises(StoreError, match="wrong_key"):
        store.read(1, A, into)
    store.close()
    assert not store.holds(1, A)


def test_a_block_is_found_by_its_key_while_it_is_there() -> None:
    store = DramStore(3, ROW)
    store.set_key(1, A)
    assert store.slot_of(A) is None, "nobody asked for it: the index of an engine that serves no peer is not paid for"
    store.keep_places()
    assert (store.slot_of(A), store.slot_of(B)) == (1, None)
    store.set_key(2, A)  # the same block again
    store.set_key(1, None)
    assert store.slot_of(A) == 2, "the slot it has left does not take the other one with it"
    store.set_key(2, B)
    assert (store.slot_of(A), store.slot_of(B)) == (None, 2)
    store.close()
    assert store.slot_of(B) is None


def test_a_row_that_could_not_be_filled_holds_nothing() -> None:
    store = DramStore(1, ROW)
    store.write(0, A, memoryview(bytearray(ROW)))
    with pytest.raises(ValueError, match="lvalue and rvalue"):
        store.write(0, B, memoryview(bytearray(ROW - 1)))
    assert not store.holds(0, A)
    assert not store.holds(0, B)
    store.close()


def test_the_slab_is_pinned_once_and_unpinned_once() -> None:
    calls: list[object] = []

    def pin(address: int, num_bytes: int, row_bytes: int) -> object:
        calls.append((address, num_bytes, row_bytes))
        return lambda: calls.append("unpinned")

    store = DramStore(3, ROW, pin)
    assert calls == [(store.rows.ctypes.data, 3 * ROW, ROW)]
    store.close()
    store.close()
    assert calls[1:] == ["unpinned"]


def test_memory_that_the_host_refuses_is_one_line() -> None:
    for rows in (1 << 46, 1 << 62):
        with pytest.raises(ConfigError) as caught:
            DramStore(rows, 4096)
        assert "--kvbm-host-dram-gb" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_closing_gives_the_memory_back() -> None:
    before = mapped_bytes()
    store = DramStore(1, GIGABYTE)
    assert mapped_bytes() > before + GIGABYTE // 2
    store.close()
    assert mapped_bytes() < before + GIGABYTE // 2


def test_closing_with_a_view_alive_gives_the_memory_back_with_the_view() -> None:
    before = mapped_bytes()
    store = DramStore(2, GIGABYTE // 2)
    view = store.rows[1]
    view[:3] = 5
    store.close()
    store.close()
    assert np.array_equal(view[:4], [5, 5, 5, 0]), "the view lost its memory"
    assert mapped_bytes() > before + GIGABYTE // 2
    del view
    gc.collect()
    assert mapped_bytes() < before + GIGABYTE // 2, "the closed store still holds the mapping"


def test_who_sees_the_new_generation_does_not_see_the_old_key() -> None:
    """A peer's question comes on another thread, between any two steps of `set_key`."""
    store = DramStore(1, 4096)
    store.write(0, BlockKey(b"old"), memoryview(bytes(4096)))
    seen: list[tuple[bool, int]] = []

    class Watched(np.ndarray):  # type: ignore[type-arg]
        def __setitem__(self, slot: object, generation: object) -> None:
            seen.append((store.holds(0, BlockKey(b"old")), int(store.rows[0, 0])))
            super().__setitem__(slot, generation)  # type: ignore[call-overload]

    store.generations = store.generations.view(Watched)
    store.write(0, BlockKey(b"new"), memoryview(b"n" * 4096))
    assert seen == [(False, 0)], "and the new one is there before the first new byte"
    generations = store.generations.tolist()
    store.close()
    assert store.generations.tolist() != generations, "peers may still read where the rows were"
