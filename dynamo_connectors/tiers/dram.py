"""G2, host DRAM: one slab of fixed rows, mapped once, pinned when the engine runs on a GPU."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.numa import prefer_node

#: Pins (address, num_bytes, row_bytes) for DMA and returns the function that unpins it.
Pinner = Callable[[int, int, int], Callable[[], None]]


class DramStore:
    """`capacity_blocks` rows of `row_bytes` each in one private mapping.

    The slab begins at a page, so rows of whole pages are aligned for direct I/O. The system hands the pages out as they
    are touched, large ones where it can, from `numa_node` where one is named. Each slot remembers the key it was
    written for: a reader that asks for another key gets an error instead of somebody else's bytes.
    """

    def __init__(
        self, capacity_blocks: int, row_bytes: int, pin: Pinner | None = None, numa_node: int | None = None
    ) -> None:
        self.capacity_blocks = capacity_blocks
        self.row_bytes = row_bytes
        self._pin = pin
        self._numa_node = numa_node
        self._unpin: Callable[[], None] | None = None
        try:
            slab = mmap.mmap(-1, capacity_blocks * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            gigabytes = capacity_blocks * row_bytes / 1e9
            raise ConfigError(
                f"the host refuses {gigabytes:.2f} GB of memory for the host_dram tier ({error}); "
                "lower --kvbm-host-dram-gb"
            ) from error
        self._keys: list[BlockKey | None] = [None] * capacity_blocks
        #: Where to look for a key first: `_keys` says whether it is there. None until `keep_places`.
        self._slots: dict[BlockKey, int] | None = None
        self._listener: Callable[[], None] | None = None
        #: How often each slot was filled, where peers that read it (`transport`) see whether it changed meanwhile.
        self.generations: npt.NDArray[np.uint64] = np.zeros(capacity_blocks, dtype=np.uint64)
        self._barrier = threading.Lock()
        #: (capacity_blocks, row_bytes) uint8 over the slab: what the copy engine reads and writes.
        self.rows: npt.NDArray[np.uint8] = np.frombuffer(slab, dtype=np.uint8).reshape(capacity_blocks, row_bytes)
        with contextlib.suppress(OSError):  # a system without huge pages
            slab.madvise(mmap.MADV_HUGEPAGE)
        if numa_node is not None:
            prefer_node(self.rows.ctypes.data, self.rows.nbytes, numa_node)
        if pin is not None:
            self._unpin = pin(self.rows.ctypes.data, self.rows.nbytes, row_bytes)

    def another(self, capacity_blocks: int) -> DramStore:
        """A slab of its own for rows of the same kind, pinned and placed alike."""
        return DramStore(capacity_blocks, self.row_bytes, self._pin, self._numa_node)

    def set_key(self, slot: int, key: BlockKey | None) -> None:
        """Names what `slot` holds: None while the copy engine fills the row, the key when it is complete."""
        held = self._keys[slot]
        if self._slots is not None and held is not None and self._slots.get(held) == slot:
            self._slots.pop(held, None)  # another thread may have put the block elsewhere just now
        if key is None:
            # In this order: who sees the new generation (`transport.owner`) must not see the old key beside it.
            self._keys[slot] = None
            with self._barrier:
                self.generations[slot] += 1
            # Who sees a byte that is written to the row from here on must not see the old generation after that: peers
            # read the row, and when all of it has come the word. x86 makes stores visible in their order; ARM does what
            # came before a lock was given back ahead of what comes after it was taken again.
            with self._barrier:
                pass
            return
        self._keys[slot] = key
        if self._slots is not None:
            self._slots[key] = slot

    def keep_places(self) -> None:
        """From now on blocks are found by key, for peers: a dict entry per block. Call it before any copy starts."""
        self._slots = {key: slot for slot, key in enumerate(self._keys) if key is not None}

    def listen(self, listener: Callable[[], None]) -> None:
        """`listener` is called when blocks have come that somebody may wait for, on the thread that brought them."""
        self._listener = listener

    def tell_of_arrivals(self) -> None:
        if self._listener is not None:
            self._listener()

    def slot_of(self, key: BlockKey) -> int | None:
        """A slot that holds it, or did a moment ago. None when none is known, as after a race between two copies."""
        return None if self._slots is None else self._slots.get(key)

    def holds(self, slot: int, key: BlockKey) -> bool:
        return self._keys[slot] == key

    def generation_of(self, slot: int) -> int:
        """Another number after every fill that has begun."""
        return int(self.generations[slot])

    def write(self, slot: int, key: BlockKey, row: memoryview) -> None:
        self._refuse_outside(slot)
        self.set_key(slot, None)
        # Assigned as memory, not as an array: numpy would spread a single byte over the row.
        memoryview(self.rows[slot])[:] = row
        self.set_key(slot, key)

    def read(self, slot: int, key: BlockKey, into: memoryview) -> None:
        self._refuse_outside(slot)
        if self._keys[slot] != key:
            raise StoreError("wrong_key", f"DRAM slot {slot} holds another block")
        into[:] = memoryview(self.rows[slot])

    def _refuse_outside(self, slot: int) -> None:
        # Closed, there are no rows at all. A negative slot would count from the end.
        if not 0 <= slot < len(self.rows):
            raise StoreError("no_slot", f"DRAM slot {slot} is outside the {len(self.rows)} open ones")

    def buffer(self, slot: int) -> memoryview:
        return memoryview(self.rows[slot])

    def close(self) -> None:
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._keys = [None] * self.capacity_blocks
        self.generations += 1  # a peer that still reads here, where the system may put anything, sees that by the words
        if self._slots is not None:
            self._slots.clear()
        # The mapping goes with its last view: here, unless one is alive somewhere, which must not dangle.
        self.rows = np.empty((0, self.row_bytes), dtype=np.uint8)
