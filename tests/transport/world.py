"""A fleet of two in one thread: an owner, a reader, a network that may do anything, and memory that READs copy from.

READs copy one row at a time, or one word, in the order that the test wants, from what the owner's memory holds at that
moment. A buffer is dead as soon as its read has ended; that nothing writes to dead buffers, and that no read calls
foreign bytes loaded, is asserted at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport.messages import Reply, Request, WindowPlace, WordsPlace
from dynamo_connectors.transport.owner import Offer, Owner, Words
from dynamo_connectors.transport.reader import Reader
from dynamo_connectors.transport.reader_state import (
    Common,
    Connect,
    Finish,
    Instruction,
    Look,
    Post,
    Restart,
    Send,
    Wanted,
)
from dynamo_connectors.transport.window_desk import Fill

PEER = "owner"
ROWS = 6
ROW_BYTES = 8
#: Fewer than some READs want, so they wait for each other, and the largest gets a part.
WINDOW_ROWS = 3
NAMESPACE = b"n" * 16


class Memory:
    """Slots of one run of the owner."""

    def __init__(self) -> None:
        self.keys: list[BlockKey | None] = [None] * ROWS
        self.generations = [0] * ROWS
        self.content: list[bytes] = [b"?"] * ROWS
        self.guesses: dict[BlockKey, int] = {}

    def holds(self, slot: int, key: BlockKey) -> bool:
        return self.keys[slot] == key

    def generation_of(self, slot: int) -> int:
        return self.generations[slot]

    def slot_of(self, key: BlockKey) -> int | None:
        """Any slot: one that holds the key, one that did, one that never has."""
        return self.guesses.get(key)

    def begin_fill(self, slot: int, is_torn: bool = True) -> None:
        self.keys[slot] = None
        self.generations[slot] += 1
        if is_torn:
            self.content[slot] = b"torn"

    def end_fill(self, slot: int, key: BlockKey) -> None:
        self.content[slot] = key
        self.keys[slot] = key
        self.guesses[key] = slot


@dataclass
class Filling:
    """A fill of the owner's window, row by row, from what host memory holds at that moment."""

    fill: Fill
    owner: Owner
    memory: Memory
    window: list[bytes]
    pairs: list[tuple[int, int]]


@dataclass
class Transfer:
    """Of rows, or of words."""

    read: int
    run: int
    #: What is still to come: where to, from where, and which of it.
    parts: list[tuple[int, Sequence[Any], int]]
    into: dict[int, Any]
    has_words: bool = False


@dataclass
class Asked:
    keys: tuple[BlockKey, ...]
    lease: bytes
    deadline: float
    in_window: bool = False
    buffers: dict[int, bytes] = field(default_factory=dict)
    reasons: tuple[str | None, ...] | None = None


class World:
    def __init__(self, quarantine_bytes: int = 3 * ROW_BYTES, has_words: bool = True) -> None:
        self.has_words = has_words
        self.now = 0.0
        self.runs = 0
        self.to_owner: list[Request] = []
        self.to_reader: list[Reply] = []
        self.transfers: list[Transfer] = []
        self.fillings: list[Filling] = []
        self.asked: dict[int, Asked] = {}
        self.pinned: dict[bytes, dict[BlockKey, int]] = {}
        self.started_anew = 0
        usual = Common(b"reader", NAMESPACE, ROW_BYTES, quarantine_bytes, 0)
        self.reader = Reader(usual._replace(window_quarantine_bytes=quarantine_bytes))
        self.start_owner()

    def start_owner(self) -> None:
        """The owner, or its next run at the same address: its memory, its leases and what it read are gone."""
        self.runs += 1
        self.memory, self.window = Memory(), [b"?"] * WINDOW_ROWS
        self.pinned = {}
        self.epoch = b"run%d" % self.runs
        place = WordsPlace(1 << 20, 2 << 20, 3 << 20) if self.has_words else None
        window = WindowPlace(8192, WINDOW_ROWS, -1)
        offer = Offer(self.epoch, NAMESPACE, b"metadata", 4096, ROWS, ROW_BYTES, window, place)
        self.words = Words([1000 * self.runs], [0] * WINDOW_ROWS)
        self.owner = Owner(offer, self.memory, 3.0, self.memory, self.words)

    # -- what the test does ------------------------------------------------------------------------------------------

    def export(self, lease: bytes, keys: list[BlockKey], slots: list[int]) -> None:
        free = [slot for slot in slots if not self.is_pinned(slot)]
        chosen = dict(zip(keys, free, strict=False))
        for key, slot in chosen.items():
            self.memory.begin_fill(slot)
            self.memory.end_fill(slot, key)
        self.pinned[lease] = chosen
        self.owner.export(lease, chosen, self.now)
        self.collect()

    def read(self, lease: bytes, keys: list[BlockKey], seconds: float, in_window: bool = False) -> int:
        number = len(self.asked)
        self.asked[number] = Asked(tuple(keys), lease, self.now + seconds, in_window)
        self.reader.read(number, PEER, Wanted(lease, tuple(keys), in_window), self.now + seconds, self.now)
        self.obey()
        return number

    def deliver_to_owner(self, at: int, keep: bool = False) -> None:
        message = self.to_owner[at] if keep else self.to_owner.pop(at)
        reply = self.owner.receive(message, self.now)
        if reply is not None:
            self.to_reader.append(reply)
        self.collect()

    def answer_waiting(self) -> None:
        self.to_reader += self.owner.answers(self.now)
        self.collect()

    def proceed(self, at: int) -> None:
        """One row of the window is filled, or the fill ends."""
        filling = self.fillings[at]
        if filling.pairs:
            slot, row = filling.pairs.pop(0)
            filling.window[row] = filling.memory.content[slot]
            return
        self.fillings.pop(at)
        grant = filling.owner.filled(filling.fill.number)
        if filling.owner is self.owner:
            self.to_reader += [grant] if grant is not None else []
            self.collect()

    def deliver_to_reader(self, at: int, keep: bool = False) -> None:
        message = self.to_reader[at] if keep else self.to_reader.pop(at)
        self.reader.receive(PEER, message, self.now)
        self.obey()

    def progress(self, at: int, part: int = 0) -> None:
        """A row or a word of a READ lands, or the READ ends."""
        transfer = self.transfers[at]
        if transfer.parts:
            to, source, which = transfer.parts.pop(part % len(transfer.parts))
            assert self.asked[transfer.read].reasons is None, "a READ wrote to memory that is somebody else's by now"
            transfer.into[to] = source[which]
            return
        self.transfers.pop(at)
        words = [transfer.into[to] for to in range(len(transfer.into))] if transfer.has_words else ()
        self.reader.transfer_ended(transfer.read, None, self.now, words)
        self.obey()

    def slots_under_read(self, read: int) -> list[int]:
        """Of the owner's present memory."""
        return [
            slot
            for transfer in self.transfers
            if transfer.read == read
            for _, source, slot in transfer.parts
            if source is self.memory.content
        ]

    def go_on(self, read: int) -> bool:
        """Progress of one READ, if it is under way."""
        at = next((at for at, transfer in enumerate(self.transfers) if transfer.read == read), -1)
        if at >= 0:
            self.progress(at)
        return at >= 0

    def disconnect(self, at: int) -> None:
        transfer = self.transfers.pop(at)
        self.reader.transfer_ended(transfer.read, "disconnected", self.now)
        self.obey()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.reader.tick(self.now)
        self.obey()
        self.owner.expire(self.now)
        self.collect()

    def is_pinned(self, slot: int) -> bool:
        return any(slot in slots.values() for slots in self.pinned.values())

    def settle(self) -> None:
        """A network that works, until everything has ended. A READ that hangs goes on hanging until its peer dies."""
        for _ in range(400):
            if not self.reader._reads:
                while self.to_owner:
                    self.deliver_to_owner(0)
                return
            while self.to_owner:
                self.deliver_to_owner(0)
            while self.to_reader:
                self.deliver_to_reader(0)
            while self.fillings:
                self.proceed(0)
            while self.transfers:
                self.progress(0)
            self.pass_time(0.25)
        raise AssertionError("reads did not end")

    def check(self) -> None:
        for asked in self.asked.values():
            for row, reason in enumerate(asked.reasons or ()):
                if reason is None:
                    assert asked.buffers.get(row) == asked.keys[row], "foreign bytes were called loaded"

    # -- what follows from it ----------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Leases that have ended: their slots may be filled anew. Fills that begin."""
        for fill in self.owner.take_fills():
            pairs = list(zip(fill.slots, fill.rows, strict=True))
            self.fillings.append(Filling(fill, self.owner, self.memory, self.window, pairs))
        for lease in self.owner.take_ended():
            del self.pinned[lease]

    def reading(self, lease: bytes) -> bool:
        """Whether a READ of the lease, in the present run, could still be accepted."""
        return any(
            self.asked[transfer.read].lease == lease
            and transfer.run == self.runs
            and self.asked[transfer.read].deadline > self.now
            for transfer in self.transfers
        )

    def obey(self) -> None:
        for instruction in self.reader.take():
            self._obey(instruction)

    def _obey(self, instruction: Instruction) -> None:
        if isinstance(instruction, Send):
            self.to_owner.append(instruction.message)
        elif isinstance(instruction, Connect):
            self.reader.connected(PEER, instruction.welcome.epoch, None, self.now)
            self.obey()
        elif isinstance(instruction, Post):
            self._start_read(instruction)
        elif isinstance(instruction, Look):
            self._start_look(instruction)
        elif isinstance(instruction, Finish):
            asked = self.asked[instruction.read]
            assert asked.reasons is None, "a read ended twice"
            assert len(instruction.reasons) == len(asked.keys)
            asked.reasons = instruction.reasons
        elif isinstance(instruction, Restart):
            self.transfers.clear()
            self.started_anew += 1
            self.reader.restarted(self.now)
            self.obey()

    def _start_read(self, post: Post) -> None:
        asked = self.asked[post.read]
        source = self.window if asked.in_window else self.memory.content
        parts: list[tuple[int, Sequence[Any], int]] = [
            (row, source, slot) for row, slot in zip(post.rows, post.slots, strict=True)
        ]
        self.transfers.append(Transfer(post.read, self.runs, parts, asked.buffers))

    def _start_look(self, look: Look) -> None:
        generations = self.words.window if self.asked[look.read].in_window else self.memory.generations
        parts: list[tuple[int, Sequence[Any], int]] = [(0, self.words.run, 0)]
        parts += [(to, generations, slot) for to, slot in enumerate(look.slots, 1)]
        self.transfers.append(Transfer(look.read, self.runs, parts, {}, has_words=True))


def talk(world: World) -> None:
    """Delivers what has been said so far, and the answers, until nobody has anything to say."""
    while world.to_owner or world.to_reader:
        while world.to_owner:
            world.deliver_to_owner(0)
        while world.to_reader:
            world.deliver_to_reader(0)
