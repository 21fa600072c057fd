"""Random lives of one slab: writes, ends of every kind, damage, old logs, changed weights. A read gives what the
weights of this engine computed for that key, or an error."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.nvme import NvmeStore, slot_offset
from dynamo_connectors.tiers.slab_files import log_path
from tests.tiers.factories import NAMESPACE

ROW, CAPACITY = 4096, 6
SLOTS, NAMES = st.integers(0, CAPACITY - 1), st.integers(0, 8)


def key_of(name: int) -> BlockKey:
    return BlockKey(f"key-{name}".encode())


def bytes_of(name: int, weights: int) -> bytes:
    """The same key means other bytes under other weights: the very thing that must never be mixed up."""
    return random.Random(f"{name} {weights}").randbytes(ROW)


class Lives(RuleBasedStateMachine):
    @initialize()
    def first_life(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="slab-"))
        self.old_logs: list[bytes] = []
        self.open()

    def open(self) -> None:
        """An engine starts with the weights on disk: number 0."""
        self.store = NvmeStore(self.directory, CAPACITY, ROW, NAMESPACE)
        self.weights = 0
        #: slot -> name of what this life wrote there; nothing else has touched these slots since.
        self.sure: dict[int, int] = {}
        assert len({slot for slot, _ in self.store.recovered}) == len(self.store.recovered)
        assert len({key for _, key in self.store.recovered}) == len(self.store.recovered)

    @rule(slot=SLOTS, name=NAMES)
    def write(self, slot: int, name: int) -> None:
        self.store.write(slot, key_of(name), memoryview(bytearray(bytes_of(name, self.weights))))
        self.sure[slot] = name

    @rule(slot=SLOTS, name=NAMES)
    def read(self, slot: int, name: int) -> None:
        into = memoryview(bytearray(ROW))
        try:
            self.store.read(slot, key_of(name), into)
        except StoreError:
            assert self.sure.get(slot) != name, "a block that was written in this life is gone"
        else:
            assert into == bytes_of(name, self.weights), "WRONG BYTES"

    @rule()
    def read_everything(self) -> None:
        for slot in range(CAPACITY):
            for name in range(9):
                self.read(slot, name)

    @rule()
    def end_and_start(self) -> None:
        self.store.close()
        self.open()

    @rule(cut=st.integers(0, 200))
    def be_killed_with_a_torn_log(self, cut: int) -> None:
        path = log_path(self.store.path)
        if self.store._log is not None:
            self.store._log.abandon()
        self.store._let_go()
        if path.exists():
            log = path.read_bytes()
            self.old_logs.append(log)
            path.write_bytes(log[: max(0, len(log) - cut)])
        self.open()

    @rule(which=st.integers(0, 10**6))
    def be_killed_and_find_an_older_log(self, which: int) -> None:
        """As after a power cut, at its worst: any log that was ever on the disk."""
        self.be_killed_with_a_torn_log(0)
        if self.old_logs and self.store._log is not None:
            self.store._log.abandon()
            self.store._let_go()
            log_path(self.store.path).write_bytes(self.old_logs[which % len(self.old_logs)])
            self.open()

    @rule()
    def change_weights(self) -> None:
        self.store.forget()
        self.weights += 1
        self.sure.clear()

    @rule(slot=SLOTS, offset=st.integers(0, 2 * ROW - 1), bit=st.integers(0, 7))
    def flip_a_bit(self, slot: int, offset: int, bit: int) -> None:
        with contextlib.suppress(FileNotFoundError), self.store.path.open("r+b") as file:
            file.seek(slot_offset(slot, ROW) + offset)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1 << bit]))
        self.sure.pop(slot, None)

    @rule(slot=SLOTS, other=SLOTS, half=st.booleans())
    def copy_a_slot(self, slot: int, other: int, half: bool) -> None:
        """A misdirected write: a whole slot, or only the bytes behind the header, lands elsewhere."""
        with contextlib.suppress(FileNotFoundError), self.store.path.open("r+b") as file:
            start = ROW if half else 0
            file.seek(slot_offset(slot, ROW) + start)
            piece = file.read(2 * ROW - start)
            file.seek(slot_offset(other, ROW) + start)
            file.write(piece)
        self.sure.pop(other, None)

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "store"):
            self.store.check()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.directory)


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
