"""Slabs that another rank writes, read by the ranks that hold the same KV (MLA): read-only, found through their logs.

The log that lets a slab outlive its engine also tells a reader which slot holds which page. It may be behind, or the
slot may have been used again: the slot's own header proves what it holds when it is read, and any doubt is a miss.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers import slot_header
from dynamo_connectors.tiers.slab_files import log_path
from dynamo_connectors.tiers.slab_format import (
    LOG_HEADER_BYTES,
    PAGE_BYTES,
    Superblock,
    decode_superblock,
    encode_log_header,
    owner_of,
    read_facts,
)
from dynamo_connectors.tiers.slot_header import HEADER_BYTES


class SlabView:
    """One slab of somebody else. Not thread-safe, but for `read`. Raises `StoreError` when it is not readable now."""

    def __init__(self, path: Path, namespace: Namespace, row_bytes: int) -> None:
        self._path = path
        self._namespace = namespace.digest
        self._row_bytes = row_bytes
        #: Buffered on purpose: what one rank reads, the others find in the page cache.
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StoreError("read_failed", f"{path}: {error.strerror}") from error
        self._inode = os.fstat(self._fd).st_ino
        try:
            self._block = self._superblock()
        except StoreError:
            self.close()
            raise
        self._owner = owner_of(self._namespace, self._block.generation)
        self._log_inode = -1
        self._log_offset = 0
        #: slot -> (sequence, key), and its inverse.
        self._in_slot: dict[int, tuple[int, BlockKey]] = {}
        self._slot_of: dict[BlockKey, int] = {}

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._slot_of

    def refresh(self) -> bool:
        """Catches up with the log. False when the slab is gone, forgotten or replaced: close this view."""
        try:
            if self._path.stat().st_ino != self._inode or self._superblock() != self._block:
                return False
            self._follow_log()
        except (OSError, StoreError):
            return False
        return True

    def read(self, key: BlockKey, into: memoryview) -> None:
        slot = self._slot_of.get(key)
        if slot is None:
            raise StoreError("no_slot", f"{self._path} does not hold the block any more")
        row = bytearray(HEADER_BYTES + self._row_bytes)
        try:
            count = os.preadv(self._fd, [row], PAGE_BYTES + slot * self._block.slot_bytes)
        except OSError as error:
            raise StoreError("read_failed", f"{self._path}: {error.strerror}") from error
        if count != len(row):
            raise StoreError("short_read", f"{self._path}: {count} of {len(row)} bytes")
        whole = memoryview(row)
        slot_header.verify(whole[:HEADER_BYTES], self._owner, key, whole[HEADER_BYTES:])
        into[:] = whole[HEADER_BYTES:]

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def check(self) -> None:
        assert len(self._slot_of) <= len(self._in_slot), "a block has no slot"
        for key, slot in self._slot_of.items():
            assert self._in_slot[slot][1] == key, f"slot {slot} holds another block than its key says"

    def _superblock(self) -> Superblock:
        try:
            block = decode_superblock(os.pread(self._fd, PAGE_BYTES, 0))
        except OSError as error:
            raise StoreError("read_failed", f"{self._path}: {error.strerror}") from error
        if block.namespace != self._namespace or block.row_bytes != self._row_bytes:
            raise StoreError("wrong_namespace", f"{self._path} belongs to another model or configuration")
        return block

    def _follow_log(self) -> None:
        with log_path(self._path).open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._log_inode:  # a checkpoint has replaced it
                self._log_inode, self._log_offset = status.st_ino, LOG_HEADER_BYTES
            if status.st_size <= self._log_offset:
                return
            file.seek(self._log_offset)
            header = encode_log_header(self._block.generation)
            for fact, record in read_facts(header + file.read(), self._block.generation):
                self._log_offset += len(record)
                self._note(fact.sequence, fact.slot, fact.key)

    def _note(self, sequence: int, slot: int, key: BlockKey) -> None:
        known = self._in_slot.get(slot)
        if known is not None:
            if known[0] >= sequence:
                return
            if self._slot_of.get(known[1]) == slot:
                del self._slot_of[known[1]]
        elsewhere = self._slot_of.get(key)
        self._in_slot[slot] = (sequence, key)
        if elsewhere is None or self._in_slot[elsewhere][0] < sequence:
            self._slot_of[key] = slot


class SharedSlabs:
    """All readable slabs of one namespace in one directory: a store that only reads. Thread-safe."""

    def __init__(self, directory: Path, namespace: Namespace, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._directory = directory
        self._namespace = namespace
        self._lock = threading.Lock()
        self._views: dict[Path, SlabView] = {}
        #: Views that are gone, but that a read may still use.
        self._readers: Counter[SlabView] = Counter()

    def match(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of `keys` the slabs hold now, as far as their logs tell."""
        with self._lock:
            self._refresh()
            return [any(key in view for view in self._views.values()) for key in keys]

    def read(self, slot: int, key: BlockKey, into: memoryview) -> None:
        """`slot` is the writer's business: the logs tell."""
        with self._lock:
            view = next((view for view in self._views.values() if key in view), None)
            if view is None:
                raise StoreError("no_slot", "no slab holds the block any more")
            self._readers[view] += 1
        try:
            view.read(key, into)
        finally:
            with self._lock:
                self._readers[view] -= 1
                self._close_unused(view)

    def close(self) -> None:
        with self._lock:
            views = list(self._views.values())
            self._views.clear()
            for view in views:
                self._close_unused(view)

    def check(self) -> None:
        with self._lock:
            for view in self._views.values():
                view.check()

    def _refresh(self) -> None:
        for path in self._directory.glob(f"kvbm-{self._namespace.digest.hex()[:16]}-*.slab"):
            if path not in self._views:
                try:
                    self._views[path] = SlabView(path, self._namespace, self.row_bytes)
                except StoreError:
                    continue  # being made, or forgotten
        for path, view in list(self._views.items()):
            if not view.refresh():
                del self._views[path]
                self._close_unused(view)

    def _close_unused(self, view: SlabView) -> None:
        if self._readers[view] == 0:
            del self._readers[view]
            if view not in self._views.values():
                view.close()
