"""The whole way of a block through the object tier: block manager, transfer engine, store and a service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import pytest
import torch
from dynamo_kernels import BlockView, ComputeFence

from dynamo_connectors.block_manager import BlockManager, NamedTier
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.cascade import jobs_of
from dynamo_connectors.config import HOST_DRAM, OBJECT_STORE
from dynamo_connectors.jobs import EraseJob, JobReport, LoadItem, LoadJob, MoveItem, MoveJob, StoreItem, StoreJob
from dynamo_connectors.tiers import object as object_module
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.tiers.object import ObjectSettings, ObjectStore
from dynamo_connectors.transfer import Job, Stores, TransferEngine
from tests.tiers.object_stores import CHUNK_BLOCKS, NAMESPACE, SETTINGS, list_all
from tests.tiers.s3_servers import FaultServer, Moto, answer, hang, moto_server, say

LAYERS, BLOCKS, PAGE_BYTES = 3, 64, 96
ROW_BYTES = LAYERS * PAGE_BYTES
DRAM_BLOCKS = 32


class Engine:
    """A worker and the index over it, with nothing in between. `pages` is the content of HBM."""

    def __init__(self, settings: ObjectSettings, capacity_chunks: int, chunk_blocks: int) -> None:
        self.pages = torch.randint(0, 256, (LAYERS, BLOCKS, PAGE_BYTES), dtype=torch.uint8)
        self.objects = ObjectStore(settings, ROW_BYTES, chunk_blocks, NAMESPACE)
        view = BlockView.of_pages(list(self.pages.unbind(0)), [PAGE_BYTES] * LAYERS)
        self.transfers = TransferEngine(view, Stores(DramStore(DRAM_BLOCKS, ROW_BYTES), None, self.objects))
        dram = NamedTier(HOST_DRAM, TierIndex(DRAM_BLOCKS))
        lower = NamedTier(OBJECT_STORE, TierIndex(capacity_chunks, erases=True), chunk_blocks)
        self.manager = BlockManager([dram, lower])
        self.numbers = count(1)

    def start(self, *jobs: Job) -> None:
        for job in jobs:
            self.transfers.submit(job, ComputeFence(torch.device("cpu")))

    def reports(self, number: int) -> dict[int, JobReport]:
        found: list[JobReport] = []
        while len(found) < number:
            found += self.transfers.poll(0.05)
        return {report.job_id: report for report in found}

    def run(self, job: Job) -> dict[BlockKey, str]:
        self.start(job)
        return dict(self.reports(1)[job.job_id].failed)

    def store(self, chain: list[BlockKey]) -> None:
        """HBM block i becomes block i of the chain in host memory."""
        targets = self.manager.reserve(chain)
        blocks = {key: block for block, key in enumerate(chain)}
        items = tuple(StoreItem(target.key, blocks[target.key], target.slot) for target in targets)
        assert not self.run(StoreJob(next(self.numbers), items))
        for target in targets:
            self.manager.commit(target)

    def move(self) -> set[str]:
        """All copies that are due; why some failed."""
        why: set[str] = set()
        while moves := self.manager.take_moves():
            for group in jobs_of(moves):
                items = tuple(MoveItem(m.key, m.source_slot, m.target_slot, m.chunk, m.row) for m in group)
                failed = self.run(MoveJob(next(self.numbers), group[0].source_tier, group[0].target_tier, items))
                for move in group:
                    self.manager.end_move(move, move.key not in failed)
                why |= set(failed.values())
        return why

    def erase(self) -> None:
        for erasure in self.manager.take_erasures():
            assert not self.run(EraseJob(next(self.numbers), erasure.tier, (erasure.key,)))
            self.manager.end_erasure(erasure)

    def drop_dram(self) -> None:
        index = self.manager.tiers[0].index
        index.clear()
        self.manager.take_changes()

    def load_job(self, chain: list[BlockKey], start: int = 0, first_block: int = 32) -> LoadJob:
        """Loads the run from `start` on to HBM blocks from `first_block` on; leases are given back at once."""
        sources = self.manager.lease(chain, start)
        self.manager.release(sources)
        items = [LoadItem(s.key, s.tier, s.slot, first_block + at, s.chunk, s.row) for at, s in enumerate(sources)]
        return LoadJob(next(self.numbers), "request", tuple(items))

    def close(self) -> None:
        self.transfers.close()
        staging = self.transfers._below[OBJECT_STORE].staging
        assert len(staging._free) == staging.store.capacity_blocks, "a staging row was lost"
        self.manager.check()


Start = Callable[..., Engine]


@pytest.fixture(autouse=True)
def environment(credentials: None) -> None:
    torch.manual_seed(3)


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[Engine] = []

    def make(url: str, capacity_chunks: int = 8, chunk_blocks: int = CHUNK_BLOCKS, **settings: float) -> Engine:
        engines.append(Engine(replace(SETTINGS, endpoint_url=url, **settings), capacity_chunks, chunk_blocks))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Moto]:
    with moto_server() as moto:
        yield moto


@pytest.fixture
def moto(service: Moto) -> Iterator[Moto]:
    yield service
    service.delete_all()


def chain_of(length: int, family: int = 0) -> list[BlockKey]:
    return [BlockKey(bytes([family, number]) * 16) for number in range(length)]


@pytest.mark.parametrize("first", [0, 1, 3, 4, 6])
def test_blocks_come_back_from_the_object_store(start: Start, moto: Moto, first: int) -> None:
    engine, chain = start(moto.url), chain_of(10)
    engine.store(chain)
    engine.manager.note_use(chain)
    assert engine.move() == set()
    engine.drop_dram()
    assert engine.manager.match(chain, first) == 8 - first, "whole chunks only"
    assert not engine.run(engine.load_job(chain, first))
    assert torch.equal(engine.pages[:, 32 : 32 + 8 - first], engine.pages[:, first:8])
    assert len(moto.names()) == 2


def test_large_blocks_have_an_object_each(start: Start, moto: Moto) -> None:
    first, chain = start(moto.url, chunk_blocks=1), chain_of(5)
    first.store(chain)
    first.manager.note_use(chain)
    assert first.move() == set()
    assert sorted(name.rsplit("/")[-1] for name in moto.names()) == [key.hex() for key in chain]
    second = start(moto.url, chunk_blocks=1)
    assert second.manager.restore(OBJECT_STORE, enumerate(list_all(second.objects))) == 5
    for engine in (first, second):
        engine.drop_dram()
        assert engine.manager.match(chain, 1) == 4
        assert not engine.run(engine.load_job(chain, 1))
        assert torch.equal(engine.pages[:, 32:36], first.pages[:, 1:5])
        assert engine.manager.prefetch(chain) == 5
        assert engine.move() == set()
        assert {item.tier for item in engine.load_job(chain).items} == {HOST_DRAM}


def test_what_one_engine_stored_another_one_serves(start: Start, moto: Moto) -> None:
    first, chain = start(moto.url), chain_of(8)
    first.store(chain)
    first.manager.note_use(chain)
    first.move()
    second = start(moto.url)
    assert second.manager.match(chain) == 0
    chunks = list_all(second.objects)
    assert second.manager.restore(OBJECT_STORE, enumerate(chunks)) == 2
    assert second.manager.match(chain) == 8
    assert not second.run(second.load_job(chain))
    assert torch.equal(second.pages[:, 32:40], first.pages[:, :8])


def test_a_prefetch_brings_blocks_up_to_host_memory(start: Start, moto: Moto) -> None:
    engine, chain = start(moto.url), chain_of(8)
    engine.store(chain)
    engine.manager.note_use(chain)
    engine.move()
    engine.drop_dram()
    assert engine.manager.prefetch(chain) == 8
    assert engine.move() == set()
    moto.delete_all()
    job = engine.load_job(chain)
    assert {item.tier for item in job.items} == {HOST_DRAM}
    assert not engine.run(job)
    assert torch.equal(engine.pages[:, 32:40], engine.pages[:, :8])


def test_a_full_tier_erases_what_it_evicts_before_it_takes_more(start: Start, moto: Moto) -> None:
    engine = start(moto.url, capacity_chunks=2)
    for family in range(6):
        chain = chain_of(4, family)
        engine.store(chain)
        engine.manager.note_use(chain)
        engine.move()
        assert len(moto.names()) <= 2, "the bound is hard"
        engine.erase()
    assert {name.rsplit("/")[-1] for name in moto.names()} <= {chain_of(4, family)[-1].hex() for family in range(6)}
    assert len(moto.names()) == len(engine.manager.tiers[1].index.readable_keys())


def test_an_object_that_is_gone_fails_its_blocks_and_no_others(start: Start, moto: Moto) -> None:
    engine, chain = start(moto.url), chain_of(8)
    engine.store(chain)
    engine.manager.note_use(chain)
    engine.move()
    engine.drop_dram()
    moto.delete_all()
    other = chain_of(4, family=9)
    engine.store(other)
    engine.manager.note_use(other)
    engine.move()
    engine.drop_dram()
    before = engine.pages.clone()
    assert engine.run(engine.load_job(chain)) == dict.fromkeys(chain, "not_found")
    assert torch.equal(engine.pages, before), "blocks that were not loaded were written to"
    assert not engine.run(engine.load_job(other))


def test_a_row_that_host_memory_lost_keeps_its_chunk_from_being_stored(start: Start, moto: Moto) -> None:
    engine, chain = start(moto.url), chain_of(4)
    engine.store(chain)
    slot = engine.manager.tiers[0].index.slot_of(chain[2])
    assert slot is not None
    engine.transfers._dram.set_key(slot, None)
    engine.manager.note_use(chain)
    assert engine.move() == {"wrong_key", "not_whole"}
    assert moto.names() == []
    assert engine.manager.tiers[1].index.stats().filling_blocks == 0


@pytest.fixture
def serve() -> Iterator[Callable[..., FaultServer]]:
    servers: list[FaultServer] = []

    def make(*arguments: object) -> FaultServer:
        servers.append(FaultServer(*arguments))  # type: ignore[arg-type]
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def restored(engine: Engine, chain: list[BlockKey]) -> None:
    """The index believes that the chain lies in the object store."""
    named = [(slot, chain[last]) for slot, last in enumerate(range(CHUNK_BLOCKS - 1, len(chain), CHUNK_BLOCKS))]
    assert engine.manager.restore(OBJECT_STORE, named) == len(named)


def test_a_load_that_queued_for_most_of_its_time_does_not_ask(start: Start, serve: Callable[..., FaultServer]) -> None:
    server = serve(hang)
    engine, chain = start(server.url, deadline_seconds=100.0), chain_of(4)
    restored(engine, chain)
    submitted = time.monotonic() - 91.0
    outcome = engine.transfers._load(engine.load_job(chain), ComputeFence(torch.device("cpu")), submitted)
    assert outcome.failed == dict.fromkeys(chain, "timeout")
    assert not server.requests, "the store is asked for what nobody waits for"


def test_loads_from_a_hung_store_end_at_their_deadline_and_hold_up_nobody(
    start: Start, serve: Callable[..., FaultServer]
) -> None:
    server = serve(hang)
    engine, chain = start(server.url, deadline_seconds=1.0), chain_of(4)
    restored(engine, chain)
    here = chain_of(4, family=5)
    engine.store(here)
    before = engine.pages.clone()
    jobs = [engine.load_job(chain) for _ in range(12)]
    engine.start(*jobs)
    meanwhile = engine.load_job(here, first_block=50)
    engine.start(meanwhile)
    reports = engine.reports(1)
    assert list(reports) == [meanwhile.job_id], "host memory does not wait for the object store"
    reports = engine.reports(len(jobs))
    assert {reason for report in reports.values() for reason in report.failed.values()} <= {"timeout", "tier_off"}
    assert all(len(report.failed) == 4 for report in reports.values())
    assert torch.equal(engine.pages[:, :50], before[:, :50])
    assert len(server.requests) <= 4, "what had to queue for its whole deadline asks nobody"
    for _ in server.requests:
        assert server.left.acquire(timeout=60), "a connection was left open"
    assert set(engine.run(engine.load_job(chain)).values()) == {"tier_off"}, "from now on it costs nothing"
    assert engine.objects.stats().failures["timeout"] >= 3, "reads that the load's deadline cut off count"


def test_a_long_load_has_one_deadline_not_one_per_object(start: Start, serve: Callable[..., FaultServer]) -> None:
    server = serve(hang)
    engine, chain = start(server.url, capacity_chunks=16, deadline_seconds=0.5), chain_of(32)
    restored(engine, chain)
    assert engine.run(engine.load_job(chain)) == dict.fromkeys(chain, "timeout")
    assert len(server.requests) <= 4, "sixteen rows at a time, and no second round"


def test_offloads_to_a_dead_store_are_dropped_and_hold_no_memory(
    start: Start, serve: Callable[..., FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_module, "_UPLOAD_SECONDS", 0.2)
    server = serve(hang)
    engine = start(server.url)
    reasons = []
    for family in range(5):
        chain = chain_of(4, family)
        engine.store(chain)
        engine.manager.note_use(chain)
        reasons.append(engine.move())
    assert reasons == [{"timeout"}] * 3 + [{"tier_off"}] * 2
    assert engine.manager.dropped == {"move_failed": 20}
    assert engine.manager.moves_in_flight == 0
    assert engine.manager.tiers[0].index.pinned_slots() == {}
    assert engine.manager.tiers[1].index.stats().filling_blocks == 0


def test_erasures_of_a_dead_store_end_when_it_closes(start: Start, serve: Callable[..., FaultServer]) -> None:
    server = serve(say(answer("503 Slow Down")))
    engine, chain = start(server.url), chain_of(4)
    job = EraseJob(7, OBJECT_STORE, (chain[-1],))
    engine.start(job)
    while not server.requests:
        time.sleep(0.01)
    engine.transfers.close()
    assert engine.reports(1)[7].failed == {chain[-1]: "closed"}
