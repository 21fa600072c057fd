"""A chain is worth its unbroken beginning, so under pressure it goes from its end: the head outlives the tail."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.sglang.page_io import PageMover
from dynamo_connectors.sglang.page_store import PageStore
from tests.sglang.test_page_store import ROW, MemoryDisk, content, keys_of, page_of

CAPACITY = 12


@pytest.fixture
def store() -> Iterator[PageStore]:
    pages = PageStore("nvme_ssd", MemoryDisk(CAPACITY, ROW), mover=PageMover(2))
    yield pages
    pages.check()
    pages.close()


def put(store: PageStore, chain: list[BlockKey], start: int, end: int) -> list[bool]:
    return store.put(chain[start:end], [page_of(content(key)) for key in chain[start:end]], chain[:start])


def get(store: PageStore, chain: list[BlockKey], start: int) -> int:
    """What SGLang does for a request that its own levels hold `start` pages of. Returns how many pages came."""
    found = store.match(chain[start:], chain[:start])
    store.note_use(chain)
    rows = [bytearray(ROW) for _ in chain[start : start + found]]
    came = store.get(chain[start : start + found], [page_of(row) for row in rows], chain[:start])
    assert all(came)
    assert [bytes(row) for row in rows] == [content(key) for key in chain[start : start + found]]
    return found


def test_the_head_outlives_its_tail_though_only_the_tail_was_read(store: PageStore) -> None:
    chain = keys_of(*(f"mine {page}" for page in range(8)))
    put(store, chain, 0, 3)
    put(store, chain, 3, 8)
    assert get(store, chain, 5) == 3
    for other in range(CAPACITY):
        put(store, keys_of(f"other {other}"), 0, 1)
        here = store.present(chain)
        assert here == sorted(here, reverse=True), f"after {other} others a page is left without its head: {here}"
    assert not any(store.present(chain)), "the pressure was too low to tell"


def test_a_tail_never_pushes_out_the_head_it_hangs_on(store: PageStore) -> None:
    chain = keys_of(*(f"mine {page}" for page in range(CAPACITY + 4)))
    for start in range(0, len(chain), 4):
        put(store, chain, start, start + 4)
    assert store.present(chain) == [True] * CAPACITY + [False] * 4
    assert store.counts().dropped == {"tier_busy": 4}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_asked_what_is_left_of_a_chain_is_its_beginning(store: PageStore, seed: int) -> None:
    choose = random.Random(seed)
    shared = keys_of("shared 0", "shared 1", "shared 2")
    chains = [shared + keys_of(*(f"{chain} {page}" for page in range(5))) for chain in range(3)]
    chains += [keys_of(*(f"{chain} {page}" for page in range(8))) for chain in (3, 4)]
    for turn in range(80):
        chain = choose.choice(chains)
        here = sum(store.present(chain))
        if choose.random() < 0.5 and here < len(chain):
            put(store, chain, here, choose.randint(here + 1, len(chain)))
        else:
            get(store, chain, choose.randint(0, here))
        for other in chains:
            left = store.present(other)
            assert left == sorted(left, reverse=True), f"turn {turn}: {left}"
    assert store.counts().evicted_pages > 0
