"""`BlockManager` over tiny tiers, against a record of what bytes every slot really holds.

The machine moves no bytes: it notes, for each slot and row, which key under which weights was last written there.
Whatever the manager serves must be exactly that, after any interleaving, also of restarts.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from dynamo_connectors.block_manager import Erasure, Move
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.cascade import jobs_of
from tests.core.manager_record import CHAINS, DISK, DRAM, OBJECT, Bytes, Kept, RecordingMachine, Slot, chains


class BlockManagerMachine(RecordingMachine):
    # -- reads ------------------------------------------------------------------------------------------------------
    @rule(chain=chains, start=st.integers(0, 3), count=st.none() | st.integers(0, 3))
    def match_and_lease(self, chain: list[BlockKey], start: int, count: int | None) -> None:
        start = min(start, len(chain))
        readable = [bool(self.places(chain, position)) for position in range(start, len(chain))]
        run = [*readable, False].index(False)
        assert self.manager.match(chain, start) == run
        sources = self.manager.lease(chain, start, count)
        leased = run if count is None else min(run, count)
        assert [source.key for source in sources] == chain[start : start + leased]
        for position, source in enumerate(sources, start):
            tier, entry = self.places(chain, position)[0]
            assert source.tier == tier, f"{source} is not from the fastest tier"
            row = position % self.shapes[tier].chunk_blocks
            is_chunked = self.shapes[tier].chunk_blocks > 1
            assert (source.chunk, source.row) == (entry if is_chunked else None, row)
            assert source.slot == self.index(tier).slot_of(entry)
            self.leases.append((source, self.served(tier, entry, row, source.key)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.release_some(data.draw(st.sets(st.integers(0, len(self.leases) - 1), min_size=1)), frozenset())

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release_damaged(self, data: st.DataObject) -> None:
        self.find_damage(data.draw(st.integers(0, len(self.leases) - 1)))

    @precondition(lambda self: self.moves)
    @rule(data=st.data())
    def read_damage_while_it_moves(self, data: st.DataObject) -> None:
        move, _ = data.draw(st.sampled_from(self.moves))
        before = len(self.leases)
        chain = next(chain for chain in CHAINS if move.key in chain)
        self.match_and_lease(chain, chain.index(move.key), 1)
        if len(self.leases) > before:
            self.find_damage(before)

    def find_damage(self, place: int) -> None:
        source, _ = self.leases[place]
        entry = source.chunk or source.key
        if self.index(source.tier).slot_of(entry) == source.slot:
            self.damage((source.tier, source.slot))
        self.release_some({place}, frozenset({source.key}))
        assert self.index(source.tier).slot_of(entry) != source.slot, "damaged bytes are still served"

    def release_some(self, places: set[int], damaged: frozenset[BlockKey]) -> None:
        for place in places:
            source, content = self.leases[place]
            assert self.bytes_in[source.tier, source.slot] == content, f"{source} changed while leased"
        self.manager.release([self.leases[place][0] for place in sorted(places)], damaged)
        self.leases = [lease for place, lease in enumerate(self.leases) if place not in places]

    # -- writes -----------------------------------------------------------------------------------------------------
    @rule(chain=chains)
    def note_use(self, chain: list[BlockKey]) -> None:
        self.manager.note_use(chain)
        self.uses.update(chain)

    @rule(chain=chains)
    def touch_and_offload(self, chain: list[BlockKey]) -> None:
        self.manager.touch(chain)
        self.manager.offload(chain)

    @rule(chain=chains, skip=st.integers(0, 2))
    def reserve(self, chain: list[BlockKey], skip: int) -> None:
        new = chain[skip:]
        wanted = [key for key in new if not self.index(DRAM).is_known(key)]
        before = self.manager.dropped.copy()
        targets = self.manager.reserve(new, chain[skip - 1] if 0 < skip <= len(chain) else None)
        assert [target.key for target in targets] == wanted[: len(targets)]
        lost = self.manager.dropped - before
        assert lost.total() == len(wanted) - len(targets)
        assert set(lost) <= {"tier_busy", "not_admitted"}
        assert self.shapes[DRAM].min_touches > 1 or not lost["not_admitted"]
        for target in targets:
            self.uses[target.key] += 1
            self.begin_fill((DRAM, target.slot))
            self.targets.append((target, self.epoch))

    @precondition(lambda self: self.targets)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.commit_at(data.draw(st.integers(0, len(self.targets) - 1)))

    @precondition(lambda self: self.targets)
    @rule(data=st.data())
    def commit_all(self, data: st.DataObject) -> None:
        self.commit_some(sorted(data.draw(st.sets(st.integers(0, len(self.targets) - 1), min_size=1))))

    def commit_at(self, place: int) -> None:
        self.commit_some([place])

    def commit_some(self, places: list[int]) -> None:
        some = [self.targets[place] for place in places]
        self.targets = [entry for place, entry in enumerate(self.targets) if place not in places]
        for target, epoch in some:
            self.bytes_in[DRAM, target.slot] = ((target.key, epoch),)
        resets = self.manager.dropped["reset"]
        if len(some) == 1:
            self.manager.commit(some[0][0])
        else:
            self.manager.commit_all([target for target, _ in some])
        kept = [target for target, epoch in some if epoch == self.epoch]
        assert self.manager.dropped["reset"] == resets + len(some) - len(kept)
        for target in kept:
            assert self.index(DRAM).slot_of(target.key) == target.slot

    @precondition(lambda self: self.targets)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        target, _ = self.targets.pop(data.draw(st.integers(0, len(self.targets) - 1)))
        failures = self.manager.dropped["copy_failed"]
        self.manager.abort(target, "copy_failed")
        assert self.manager.dropped["copy_failed"] == failures + 1

    # -- copies between tiers ---------------------------------------------------------------------------------------
    @rule(chain=chains)
    def prefetch(self, chain: list[BlockKey]) -> None:
        readable = [
            bool(self.places(chain, place)) or self.index(DRAM).is_known(key) for place, key in enumerate(chain)
        ]
        run = chain[: [*readable, False].index(False)]
        assert self.manager.prefetch(chain) <= sum(1 for key in run if not self.index(DRAM).is_known(key))

    @rule()
    def take_moves(self) -> None:
        started = self.manager.take_moves()
        for job in jobs_of(started):
            self.look_at_job(job)
        for move in started:
            content = self.bytes_in[move.source_tier, move.source_slot]
            row = move.row if move.target_tier == DRAM else 0
            assert content[row] == (move.key, self.epoch), f"{move} would copy {content}"
            if (move.target_tier, move.target_slot) not in [(m.target_tier, m.target_slot) for m, _ in self.moves]:
                self.begin_fill((move.target_tier, move.target_slot))
            self.moves.append((move, content))

    def look_at_job(self, job: list[Move]) -> None:
        move = job[0]
        assert DRAM in (move.source_tier, move.target_tier)
        if move.target_tier == DRAM:
            return
        shape = self.shapes[move.target_tier]
        assert [item.row for item in job] == list(range(shape.chunk_blocks)), "a chunk is written in one job"
        assert {item.chunk for item in job} == {job[-1].key if shape.chunk_blocks > 1 else None}
        assert len({item.target_slot for item in job}) == 1
        for item in job:
            assert self.uses[item.key] >= shape.min_touches, f"{item} was not used often enough"

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), how=st.sampled_from(["ok", "ok", "ok", "was there", "failed", "half sent", "damaged"]))
    def end_move(self, data: st.DataObject, how: str) -> None:
        self.end_move_at(data.draw(st.integers(0, len(self.moves) - 1)), how)

    def end_move_at(self, place: int, how: str) -> None:
        move, content = self.moves[place]
        source, target = (move.source_tier, move.source_slot), (move.target_tier, move.target_slot)
        assert self.bytes_in[source] == content, f"the source of {move} changed"
        is_up = move.target_tier == DRAM
        entry = move.chunk if is_up and move.chunk else move.key
        if how == "damaged" and self.index(source[0]).slot_of(entry) == source[1]:
            self.damage(source)
        _, content = self.moves.pop(place)
        rows = list(self.bytes_in[target])
        is_good = how in ("ok", "was there")
        rows[0 if is_up else move.row] = content[move.row if is_up else 0] if is_good else None
        self.bytes_in[target] = tuple(rows)
        is_last = target not in [(other.target_tier, other.target_slot) for other, _ in self.moves]
        self.manager.end_move(move, is_good, damaged=how == "damaged", sent=how in ("ok", "half sent"))
        if is_last and target[0] == OBJECT:
            self.wrote_chunk(target, move.chunk or move.key)

    def wrote_chunk(self, slot: Slot, name: BlockKey) -> None:
        is_kept = self.index(OBJECT).slot_of(name) == slot[1]
        if is_kept:
            chain = next(chain for chain in CHAINS if name in chain)
            end = chain.index(name) + 1
            self.known_blocks[name] = tuple(chain[end - self.shapes[OBJECT].chunk_blocks : end])
        self.collect_erasures()
        if not is_kept and Erasure(OBJECT, name, slot[1]) not in self.erasures:
            del self.bytes_in[slot]  # never put

    @rule()
    def take_erasures(self) -> None:
        self.collect_erasures()

    def collect_erasures(self) -> None:
        for erasure in self.manager.take_erasures():
            assert not self.busy()[erasure.tier, erasure.slot], f"{erasure} is still in use"
            assert (erasure.tier, erasure.slot) not in self.kept, f"{erasure} is pinned"
            self.erasures.append(erasure)

    @precondition(lambda self: self.erasures)
    @rule(data=st.data())
    def end_erasure(self, data: st.DataObject) -> None:
        erasure = self.erasures.pop(data.draw(st.integers(0, len(self.erasures) - 1)))
        del self.bytes_in[erasure.tier, erasure.slot]
        self.manager.end_erasure(erasure)

    @rule(chain=chains, finish=st.booleans())
    def store_and_sink(self, chain: list[BlockKey], finish: bool) -> None:
        """What random single steps reach too seldom: every tier full of readable blocks."""
        for _ in range(max(shape.min_touches for shape in self.shapes.values())):
            self.note_use(chain)
        self.reserve(chain, 0)
        while self.targets:
            self.commit_at(0)
        self.manager.offload(chain)
        self.take_moves()
        while self.moves and finish:
            self.end_move_at(0, "ok")

    # -- pins -------------------------------------------------------------------------------------------------------
    @rule(chain=chains, seconds=st.integers(1, 5))
    def pin(self, chain: list[BlockKey], seconds: int) -> None:
        until = self.now + seconds
        pinned = self.manager.pin(chain, until)
        for position in range(pinned):
            places = self.places(chain, position)
            if places:
                self.keep(*places[0], until)
            else:
                assert self.index(DRAM).is_known(chain[position])
        if pinned < len(chain) and self.places(chain, pinned):
            assert self.manager.dropped["pin_refused"]

    def keep(self, tier: str, entry: BlockKey, until: int) -> None:
        slot = self.index(tier).slot_of(entry)
        assert slot is not None
        kept = self.kept.setdefault((tier, slot), Kept(entry, until))
        kept.until = max(kept.until, until)
        held = sum(1 for other, _ in self.kept if other == tier)
        assert held <= self.shapes[tier].capacity // 2, f"pins hold {held} slots of {tier}"

    @rule(seconds=st.integers(0, 4))
    def expire_pins(self, seconds: int) -> None:
        self.now += seconds
        self.manager.expire_pins(self.now)
        self.kept = {slot: kept for slot, kept in self.kept.items() if kept.until > self.now}

    # -- the end of everything --------------------------------------------------------------------------------------
    @rule(really=st.integers(0, 7))
    def clear(self, really: int) -> None:
        if really:
            return  # tiers that are always empty show nothing
        self.manager.clear()
        self.epoch += 1
        self.kept = {}
        assert self.manager.match(CHAINS[0]) == 0
        assert not self.manager.has_moves_waiting

    @rule(really=st.integers(0, 5))
    def restart(self, really: int) -> None:
        """The process is killed. Disk and store keep what was written completely, whatever the index made of it."""
        if really:
            return
        kept = {slot: rows for slot, rows in self.bytes_in.items() if slot[0] != DRAM}
        names = {slot: rows[-1][0] for slot, rows in kept.items() if rows[-1] is not None and self.is_whole(rows)}
        self.boot()
        self.bytes_in = {slot: rows for slot, rows in kept.items() if slot in names}
        for tier in (DISK, OBJECT):
            entries = [(slot, name) for (where, slot), name in names.items() if where == tier]
            if tier in self.shapes:
                taken = self.manager.restore(tier, entries)
                assert taken == len({name for _, name in entries}), "the index forgot what the tier has kept"
                self.uses.update({name: self.shapes[tier].min_touches for _, name in entries})
        for tier, slot in list(self.bytes_in):
            if self.index(tier).slot_of(names[tier, slot]) != slot:
                del self.bytes_in[tier, slot]  # a second copy: overwritten, or erased, before it counts

    def is_whole(self, rows: Bytes) -> bool:
        return all(row is not None and row[1] == self.epoch for row in rows)

    @rule()
    def take_changes(self) -> None:
        for change in self.manager.take_changes():
            tier = self.replayed[change.tier]
            if change.kind == "stored":
                assert change.key not in tier, f"{change} came twice"
                tier.add(change.key)
            else:
                assert change.key in tier, f"{change} was never stored"
                tier.remove(change.key)
        for named in self.manager.tiers:
            readable = {
                key
                for name in named.index.readable_keys()
                for key in (self.known_blocks.get(name, (name,)) if named.chunk_blocks > 1 else (name,))
            }
            assert self.replayed[named.name] == readable, f"the changes of {named.name} do not add up"

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        for named in self.manager.tiers:
            for name in named.index.readable_keys():
                slot = named.index.slot_of(name)
                assert slot is not None
                rows = self.bytes_in[named.name, slot]
                assert rows[-1] == (name, self.epoch), f"{named.name} slot {slot} would serve {rows} for {name!r}"
                assert self.is_whole(rows), f"{named.name} slot {slot} would serve {rows}"
        for (tier, slot), kept in self.kept.items():
            assert self.index(tier).slot_of(kept.entry) == slot, f"a pinned block left slot {slot} of {tier}"
        assert self.manager.moves_in_flight == len(self.moves)

    def teardown(self) -> None:
        """When everybody has reported, nothing is held any more."""
        self.limit.stop()
        if not hasattr(self, "manager"):
            return
        while self.targets:
            self.commit_at(0)
        while self.moves:
            self.end_move_at(0, "ok")
        self.manager.release([source for source, _ in self.leases])
        self.expire_pins(1000)
        self.collect_erasures()
        for erasure in self.erasures:
            self.manager.end_erasure(erasure)
        self.manager.check()
        for name, stats in self.manager.stats().items():
            held = (stats.pinned_blocks, stats.filling_blocks, stats.evicting_blocks, stats.quarantined_blocks)
            assert held == (0, 0, 0, 0), f"{name} leaks: {stats}"


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
