"""The file that remembers which slot holds which block: appended to as blocks are written, rewritten when it grows.

A checkpoint is a new log that begins with one fact per live slot; it replaces the old one by an atomic rename. Nothing
is synced: whatever a power cut leaves is a prefix, and slot headers prove the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.slab_format import (
    Fact,
    encode_fact,
    encode_log_header,
    holds_key,
    newest_facts,
    read_facts,
)

log = logging.getLogger(__name__)

#: A log may grow by this much, or by its size after the last checkpoint if that is more, before the next one.
MIN_GROWTH_BYTES = 1 << 20


class IndexLog:
    """The log of one generation of one slab. Thread-safe; the slab's lock guards the file against other engines.

    A log that cannot be written any more is given up: blocks written later are not found after a restart, nothing else.
    """

    def __init__(self, path: Path, generation: bytes, capacity_blocks: int) -> None:
        """Replays what `path` proves, then starts it anew from that. Raises OSError when it cannot be read."""
        self._path = path
        self._generation = generation
        self._lock = threading.Lock()
        self._fd = -1
        #: The newest record of every slot, ready to be written out; and its sequence.
        self._live: list[bytes | None] = [None] * capacity_blocks
        self._sequences = array("Q", bytes(8 * capacity_blocks))
        facts = newest_facts(read_facts(_read(path), generation), capacity_blocks)
        #: What the log knew when it was opened, oldest first.
        self.recovered: Sequence[Fact] = [fact for fact, _ in facts]
        for fact, record in facts:
            self._live[fact.slot] = record
            self._sequences[fact.slot] = fact.sequence
        self._checkpoint_bytes = self._size_bytes = 0
        try:
            self._checkpoint()
        except OSError as error:
            self._give_up(error)

    def append(self, facts: Sequence[Fact]) -> None:
        """Remembers blocks that are completely written. Never raises: see the class."""
        with self._lock:
            records = []
            for fact in facts:
                if fact.sequence > self._sequences[fact.slot]:
                    record = encode_fact(self._generation, fact)
                    self._live[fact.slot] = record
                    self._sequences[fact.slot] = fact.sequence
                    records.append(record)
            if self._fd < 0:
                return
            try:
                self._write(self._fd, b"".join(records))
                if self._size_bytes - self._checkpoint_bytes > max(MIN_GROWTH_BYTES, self._checkpoint_bytes):
                    self._checkpoint()
            except OSError as error:
                self._give_up(error)

    def drop(self, slot: int, key: BlockKey) -> None:
        """The slot turned out not to hold `key`: the next checkpoint leaves it out."""
        with self._lock:
            record = self._live[slot]
            if record is not None and holds_key(record, key):
                self._live[slot] = None

    def close(self) -> None:
        """Writes a last checkpoint. Idempotent."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                self._checkpoint()
            except OSError as error:
                self._give_up(error)
            self._close_file()

    def abandon(self) -> None:
        """Closes the file as it is: everything appended so far is in it."""
        with self._lock:
            self._close_file()

    def check(self) -> None:
        with self._lock:
            for slot, record in enumerate(self._live):
                assert record is None or self._sequences[slot] > 0, f"slot {slot} is logged without a sequence"
            assert self._fd < 0 or os.fstat(self._fd).st_size == self._size_bytes, "the log's size is not what it says"

    def _checkpoint(self) -> None:
        """Replaces the file by one record per live slot. On an error the old file stays as it was."""
        temporary = self._path.with_name(self._path.name + ".tmp")
        before = self._size_bytes
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(temporary, flags, 0o600)
        try:
            self._size_bytes = 0
            self._write(fd, b"".join([encode_log_header(self._generation), *filter(None, self._live)]))
            os.rename(temporary, self._path)
        except BaseException:
            self._size_bytes = before
            os.close(fd)
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._close_file()
        self._fd, self._checkpoint_bytes = fd, self._size_bytes

    def _write(self, fd: int, data: bytes) -> None:
        written = os.write(fd, data)
        self._size_bytes += written
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes were taken")

    def _give_up(self, error: OSError) -> None:
        log.warning(
            "dynamo: %s cannot be written (%s); blocks kept from now on end with this engine", self._path, error
        )
        self._close_file()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
