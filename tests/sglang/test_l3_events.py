"""What routers hear of our tiers, as SGLang's own records, read back with our own proxy's decoder and index."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from dynamo_proxy.block_hash import block_hash, root_hash
from dynamo_proxy.kv_events import decode_batch
from dynamo_proxy.kv_index import MEDIUM_BITS, KvIndex, Outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import NVME_SSD, OBJECT_STORE
from dynamo_connectors.sglang import compat
from dynamo_connectors.sglang.backend import HiCacheBackend
from dynamo_connectors.sglang.l3_events import REMOVED, STORED, Removed, Stored, TierEvents
from tests.sglang.conftest import MakeBackend
from tests.sglang.host_pool import FakeHostPool

PAGE = 4


def hashes(*pages: int) -> list[str]:
    return [f"{page + 1:016x}".ljust(64, "0") for page in pages]


def keys(*pages: int) -> list[BlockKey]:
    return [BlockKey(key.encode()) for key in hashes(*pages)]


def tokens(*pages: int) -> list[int]:
    return [100 * page + token for page in pages for token in range(PAGE)]


class BlockStored(msgspec.Struct, omit_defaults=True, tag=True):
    """SGLang 0.5.23's record; the engine test has the real one."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None


class BlockRemoved(msgspec.Struct, omit_defaults=True, tag=True):
    block_hashes: list[int]
    medium: str | None = None


class KVEventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Any]


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    records = SimpleNamespace(BlockStored=BlockStored, BlockRemoved=BlockRemoved, KVEventBatch=KVEventBatch)
    monkeypatch.setattr(compat, "_import", lambda name: records)
    monkeypatch.setattr(compat, "resolve", lambda path: lambda text: int(text[:16], 16))


class Router:
    """Our proxy's view of one engine, fed through the bytes that go over the wire."""

    def __init__(self) -> None:
        self.index = KvIndex()
        self.outcomes: set[Outcome] = set()
        self.enable_kv_cache_events = True
        self.kv_event_publisher = self

    def publish(self, batch: Any) -> None:
        for event in decode_batch(msgspec.msgpack.encode(batch))[0]:
            self.outcomes.add(self.index.apply(0, 0, event))

    def hear(self, events: Sequence[Stored | Removed]) -> None:
        compat.publish_events(self, events, PAGE)

    def on_disk(self, count: int, medium: str = "DISK") -> list[bool]:
        """Which of the first `count` pages of the chain 0, 1, 2, ... the index believes to be on the disk."""
        parent, held = root_hash("", ""), []
        for page in range(count):
            parent = block_hash(parent, tuple(tokens(page)), b"")
            held.append(bool(self.index.media(0, parent) & MEDIUM_BITS[medium]))
        return held


@pytest.mark.parametrize(("tier", "medium"), [(NVME_SSD, "DISK"), (OBJECT_STORE, "EXTERNAL")])
def test_looked_up_and_stored_it_is_announced_with_tokens_and_parent(tier: str, medium: str) -> None:
    events, router = TierEvents(PAGE), Router()
    events.describe(keys(0, 1, 2), tokens(0, 1, 2), None)
    for key in keys(0, 1):
        events.note(STORED, tier, key)
    taken = events.take()
    assert taken == [Stored(tuple(keys(0, 1)), None, tuple(tokens(0, 1)), medium)]
    router.hear(taken)
    events.note(STORED, tier, keys(2)[0])
    router.hear(events.take())
    assert router.on_disk(4, medium) == [True, True, True, False]
    assert router.outcomes == {Outcome.APPLIED}
    events.note(REMOVED, tier, keys(2)[0])
    router.hear(events.take())
    assert router.on_disk(3, medium) == [True, True, False]
    assert events.take() == []


def test_without_tokens_it_adds_the_disk_to_blocks_that_routers_know() -> None:
    events, router = TierEvents(PAGE), Router()
    router.hear([Stored(tuple(keys(0, 1)), None, tuple(tokens(0, 1)), "GPU")])
    assert router.on_disk(2) == [False, False]
    for key in keys(0, 1):
        events.note(STORED, NVME_SSD, key)
    bare = events.take()
    assert bare == [Stored(tuple(keys(0, 1)), None, (), "DISK")]
    router.hear(bare)
    assert router.on_disk(2) == [True, True]


def test_blocks_of_an_earlier_life_are_announced_when_they_are_looked_up() -> None:
    events, router = TierEvents(PAGE), Router()
    events.recovered(NVME_SSD, keys(0, 1, 2))
    assert events.take() == []
    events.describe(keys(0, 1, 5), tokens(0, 1, 5), None)
    router.hear(events.take())
    assert router.on_disk(3) == [True, True, False]
    events.describe(keys(2), tokens(2), keys(1)[0])
    router.hear(events.take())
    assert router.on_disk(3) == [True] * 3
    events.describe(keys(0, 1, 2), tokens(0, 1, 2), None)
    assert events.take() == [], "once is enough"


def test_after_all_was_cleared_what_is_looked_up_is_announced_again() -> None:
    events = TierEvents(PAGE)
    events.describe(keys(0), tokens(0), None)
    events.note(STORED, NVME_SSD, keys(0)[0])
    assert len(events.take()) == 1
    events.routers_forgot()
    events.describe(keys(0), tokens(0), None)
    assert len(events.take()) == 1


def test_runs_break_where_the_chain_does() -> None:
    events = TierEvents(PAGE)
    events.describe(keys(0, 1), tokens(0, 1), None)
    events.describe(keys(7), tokens(7), keys(0)[0])
    for key in keys(0, 1, 7, 8, 9):
        events.note(STORED, NVME_SSD, key)
    assert [stored.keys for stored in events.take()] == [
        tuple(keys(0, 1)),
        tuple(keys(7)),
        tuple(keys(8, 9)),
    ]


def test_nobody_listening_costs_bounded_memory() -> None:
    events = TierEvents(PAGE)
    for number in range(70_000):
        events.note(STORED, NVME_SSD, BlockKey(b"%d" % number))
    events.check()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_a_router_never_believes_in_what_is_gone(seed: int) -> None:
    choose, events, router = random.Random(seed), TierEvents(PAGE), Router()
    here: set[int] = set()
    events.describe(keys(*range(6)), tokens(*range(6)), None)
    for _ in range(40):
        page = choose.randrange(6)
        if page in here:
            here.remove(page)
            events.note(REMOVED, NVME_SSD, keys(page)[0])
        else:
            here.add(page)
            events.note(STORED, NVME_SSD, keys(page)[0])
        if choose.random() < 0.5:
            router.hear(events.take())
        events.check()
    router.hear(events.take())
    # A block that came while its parent was away stays unknown to routers: only what they believe is compared.
    assert all(page in here for page, held in enumerate(router.on_disk(6)) if held)


class PublishingBackend(HiCacheBackend):
    def _publishes_events(self) -> bool:
        return True


def test_a_backend_tells_of_its_pages(make_backend: MakeBackend) -> None:
    pool = FakeHostPool(pages=8)
    backend = make_backend(pool, kind=PublishingBackend)
    backend.describe(hashes(0, 1, 2), tokens(0, 1, 2), None)
    assert all(backend.batch_set_v1(hashes(0, 1, 2), pool.slots(0, 1, 2)))
    router = Router()
    router.hear(backend.take_events()[0])
    assert router.on_disk(3) == [True] * 3
    backend.clear()
    router.hear(backend.take_events()[0])
    assert router.on_disk(3) == [False] * 3
    assert make_backend(FakeHostPool(pages=2)).take_events() == ([], 0)


@pytest.mark.parametrize(
    "operation",
    [
        SimpleNamespace(token_ids=[1, 2, 3, 4]),
        SimpleNamespace(token_ids=SimpleNamespace(raw_token_ids=list, is_bigram=True, extra_key=None)),
        SimpleNamespace(token_ids=SimpleNamespace(raw_token_ids=list, is_bigram=False, extra_key="tenant")),
        SimpleNamespace(
            token_ids=SimpleNamespace(raw_token_ids=list, is_bigram=False, extra_key=None, cache_salt="salt")
        ),
    ],
)
def test_what_sglang_hashes_otherwise_is_not_described(operation: Any) -> None:
    assert compat.looked_up(operation, ([], 0)) is None
