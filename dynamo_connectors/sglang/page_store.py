"""Pages of one pool of one worker on the disk, and below it: a block manager decides, stores keep, a mover moves.

SGLang calls from several threads. One lock guards the decisions; bytes move outside it, under a lease or a reservation.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from dynamo_connectors.block_manager import BlockManager, Change, Erasure, NamedTier, Source
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.cascade import jobs_of
from dynamo_connectors.sglang import page_io
from dynamo_connectors.sglang.object_tier import Lower, Offloaded
from dynamo_connectors.sglang.page_io import Page, PageMover, Work
from dynamo_connectors.tiers.base import TierStore
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.verdicts import damaged

logger = logging.getLogger(__name__)

_store_numbers = itertools.count(1)
#: Of the time that closing may take: until then transfers end, and then the tier below; the rest is for the checkpoint.
_TRANSFERS_SHARE, _LOWER_SHARE = 0.6, 0.8


class LastingStore(TierStore, Protocol):
    """A store whose bytes outlive the engine, unless they are forgotten."""

    recovered: Sequence[tuple[int, BlockKey]]

    def forget(self) -> None:
        """Nothing written so far is ever served again, here or by a later engine."""


class Transfer(NamedTuple):
    """One batch that moved bytes."""

    tier: str
    is_read: bool
    pages: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class PageCounts:
    """Totals since the start, and what the tier holds now.

    `asked_pages` were looked up. `dropped` (not kept, or no longer) and `load_failures` (gave no bytes) are by reason;
    a damaged page is in both.
    """

    asked_pages: int
    read_pages: int
    written_pages: int
    dropped: dict[str, int]
    load_failures: dict[str, int]
    ready_pages: int
    capacity_pages: int
    evicted_pages: int
    #: Of an earlier run.
    recovered_pages: int = 0
    #: Of an object store: what it refused, lost or got wrong, by reason, and how often it was left alone.
    store_failures: Mapping[str, int] = field(default_factory=dict)
    circuits_opened: int = 0
    #: Tells the totals of one store from those of the store that takes its place.
    store: int = 0


@dataclass(frozen=True)
class Watcher:
    """Told of what happens, from whatever thread: `on_changes` under the store's lock and in order.

    `on_background`: the counts have changed though nobody called.
    """

    on_changes: Callable[[Sequence[Change]], None] = lambda changes: None
    on_transfer: Callable[[Transfer], None] = lambda transfer: None
    on_background: Callable[[], None] = lambda: None


class PageStore:
    """Owns `store` and `lower`: `close` closes them. `clock` gives seconds.

    `before` is the keys of the pages before the given ones, from the first of the chain on: pages are evicted from the
    end of their chain, and the chunks of a lower tier are aligned to it. None says that nobody can tell.
    """

    def __init__(
        self,
        name: str,
        store: LastingStore,
        watcher: Watcher | None = None,
        mover: PageMover | None = None,
        lower: Lower | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._number = next(_store_numbers)
        self._lower = lower
        self._store = store
        self._watcher = watcher or Watcher()
        self._mover = mover or PageMover()
        disk = NamedTier(name, TierIndex(store.capacity_blocks))
        below = [] if lower is None else [lower.named]
        self._manager = BlockManager([disk, *below], {tier.name: lower.min_touches for tier in below if lower})
        self._recovered_pages = self._manager.restore(name, store.recovered)
        store.recovered = ()
        self._manager.take_changes()  # what was there before is no news
        self._clock = clock
        self._lock = threading.Lock()
        self._is_open = True
        self._is_suspended = False
        self._load_failures: Counter[str] = Counter()
        self._asked_pages = 0
        self._read_pages = 0
        self._written_pages = 0
        #: Of the lower tier.
        self._raised_pages = 0
        self._lowered_pages = 0
        self._listed_pages = 0
        if lower is not None:
            lower.when_listed(self._listed)

    def note_use(self, chain: Sequence[BlockKey]) -> None:
        """A request uses these pages, given from the first of the chain on. Once per request."""
        with self._lock:
            if self._serves:
                self._manager.note_use(chain)
        self._move_down()

    def match(self, keys: Sequence[BlockKey], before: Sequence[BlockKey] | None = ()) -> int:
        """Length of the leading run of `keys` that can be read now."""
        with self._lock:
            self._asked_pages += len(keys)
            if not self._serves:
                return 0
            if before is None:
                self._load_failures["chain_unknown"] += len(keys)
                return 0
            self._take_listed()
            return self._manager.match([*before, *keys], len(before))

    def present(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of `keys` can be read now."""
        with self._lock:
            index = self._manager.tiers[0].index
            return [self._serves and key in index for key in keys]

    def put(
        self, keys: Sequence[BlockKey], pages: Sequence[Page], before: Sequence[BlockKey] | None = ()
    ) -> list[bool]:
        """Keeps pages; True for each one that is here (or on its way here by another thread) afterwards."""
        page_of = dict(zip(keys, pages, strict=True))
        above = list(before or ())
        chain = [*above, *page_of]
        with self._lock:
            if not self._serves:
                return [False] * len(keys)
            # The head of the chain is leased so that its own tail cannot push it out.
            held = self._manager.lease(chain)
            if len(held) < len(above):
                held += self._manager.lease(chain, len(above))
            targets = self._manager.reserve(page_of, above[-1] if above else None)
            self._tell_changes()
        started = self._clock()
        failures = self._mover.write(
            self._store, [Work(target.slot, target.key, page_of[target.key]) for target in targets]
        )
        with self._lock:
            for target in targets:
                reason = failures.get(target.key)
                if reason is None:
                    self._manager.commit(target)
                else:
                    self._manager.abort(target, reason)
            self._manager.release(held)
            if before is not None:
                self._manager.offload(chain)
            self._tell_changes()
            written = len(targets) - len(failures)
            self._written_pages += written
            index = self._manager.tiers[0].index
            kept = [index.is_known(key) for key in keys]
        self._tell_transfer(self._name, is_read=False, pages=written, started=started)
        self._move_down()
        return kept

    def get(self, keys: Sequence[BlockKey], pages: Sequence[Page], before: Sequence[BlockKey] = ()) -> list[bool]:
        """Fills the leading run of `pages` that can be read; a page answered False is untouched or worthless."""
        chain = [*before, *keys]
        with self._lock:
            if not self._serves:
                return [False] * len(keys)
            sources = self._manager.lease(chain, len(before))
        # A prefix is all that can be used, and only its pages are leased.
        leased = list(zip(sources, pages, strict=False))
        on_disk = [Work(source.slot, source.key, page) for source, page in leased if source.tier == self._name]
        deeper = [(source, page) for source, page in leased if source.tier != self._name]
        started = self._clock()
        failures = self._mover.read(self._store, on_disk)
        read = len(on_disk) - len(failures)
        self._tell_transfer(self._name, is_read=True, pages=read, started=started)
        raised, late = self._raise(deeper)
        with self._lock:
            failures |= late
            self._manager.release(sources, damaged(failures))
            self._manager.touch(chain)
            self._tell_changes()
            self._read_pages += read
            self._raised_pages += raised
            self._load_failures.update(failures.values())
            # Weights may have changed while the bytes came up.
            is_trusted = self._serves
        self._move_down()  # what was found damaged is erased
        return [is_trusted and index < len(sources) and key not in failures for index, key in enumerate(keys)]

    def suspend(self) -> None:
        """From now on nothing is kept and nothing is served, until `resume`."""
        with self._lock:
            self._is_suspended = True
            self._forget()

    def resume(self) -> None:
        with self._lock:
            if self._is_suspended:
                self._forget()
                self._is_suspended = False

    def clear(self) -> None:
        """Forgets every page. Transfers in flight end in peace and are not kept."""
        with self._lock:
            self._forget()

    def lower_counts(self) -> dict[str, PageCounts]:
        """Of the tier below, by its name; reasons are counted for the disk, with its own."""
        if self._lower is None:
            return {}
        name, store = self._lower.named.name, self._lower.stats()
        with self._lock:
            held = self._manager.stats()[name]
            numbers = (held.ready_blocks, held.capacity_blocks, held.evicted_blocks_total)
            moved = (self._raised_pages, self._lowered_pages)
            troubles = (store.failures, store.circuits_opened)
            return {name: PageCounts(0, *moved, {}, {}, *numbers, self._listed_pages, *troubles, self._number)}

    def counts(self) -> PageCounts:
        with self._lock:
            stats = self._manager.stats()[self._name]
            return PageCounts(
                asked_pages=self._asked_pages,
                read_pages=self._read_pages,
                written_pages=self._written_pages,
                dropped=dict(self._manager.dropped),
                load_failures=dict(self._load_failures),
                ready_pages=stats.ready_blocks,
                capacity_pages=stats.capacity_blocks,
                evicted_pages=stats.evicted_blocks_total,
                recovered_pages=self._recovered_pages,
                store=self._number,
            )

    def close(self, deadline: float | None = None) -> None:
        """Waits for transfers in flight, then gives everything back, by `deadline` (of `time.monotonic`). Idempotent.

        A disk that hangs keeps its threads, not the caller.
        """
        with self._lock:
            self._is_open = False
        begun = time.monotonic()
        deadline = begun + page_io.CLOSE_SECONDS if deadline is None else max(begun, deadline)
        has_ended = self._mover.close(begun + _TRANSFERS_SHARE * (deadline - begun))
        if self._lower is not None:
            self._lower.close(begun + _LOWER_SHARE * (deadline - begun))
        # On a thread of its own: the last checkpoint is a write like any other.
        closer = threading.Thread(target=self._store.close, name="dynamo-kvbm-close", daemon=True)
        closer.start()
        closer.join(max(0.0, deadline - time.monotonic()))
        if closer.is_alive() or not has_ended:
            logger.error("dynamo: the disk of tier %s does not answer; it is left as it is", self._name)

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        with self._lock:
            self._manager.check()
            assert self._read_pages >= 0, "the count of pages read is negative"

    @property
    def _serves(self) -> bool:
        return self._is_open and not self._is_suspended

    def _forget(self) -> None:
        self._manager.clear()
        self._store.forget()
        if self._lower is not None:
            self._lower.forget()
        self._tell_changes()

    def _tell_changes(self) -> None:
        changes = self._manager.take_changes()
        if changes:
            self._watcher.on_changes(changes)

    def _raise(self, work: Sequence[tuple[Source, Page]]) -> tuple[int, dict[BlockKey, str]]:
        """Reads pages of the lower tier: how many came, and why the others did not."""
        if self._lower is None or not work:
            return 0, {}
        started = self._clock()
        failed = self._lower.read(work)
        self._tell_transfer(self._lower.named.name, is_read=True, pages=len(work) - len(failed), started=started)
        return len(work) - len(failed), failed

    def _move_down(self) -> None:
        """Starts the copies to the lower tier that are due."""
        if self._lower is None:
            return
        with self._lock:
            moves = self._manager.take_moves() if self._is_open else []
            erasures = self._manager.take_erasures()
        for job in jobs_of(moves):
            self._lower.offload(job, self._store, self._moved_down)
        for erasure in erasures:
            self._lower.erase(erasure.key, partial(self._erased, erasure))

    def _erased(self, erasure: Erasure) -> None:
        with self._lock:
            self._manager.end_erasure(erasure)

    def _moved_down(self, offloaded: Offloaded) -> None:
        with self._lock:
            for move in offloaded.moves:
                self._manager.end_move(move, offloaded.ok, move.key == offloaded.damaged, offloaded.sent)
            moved = len(offloaded.moves) if offloaded.ok else 0
            self._lowered_pages += moved
            self._tell_changes()
        if self._lower is not None and moved:
            num_bytes = moved * self._store.row_bytes
            name = self._lower.named.name
            self._watcher.on_transfer(Transfer(name, False, moved, num_bytes, offloaded.seconds))
        self._watcher.on_background()
        self._move_down()  # what waited for room to move

    def _listed(self) -> None:
        with self._lock:
            self._take_listed()
            self._tell_changes()
        self._watcher.on_background()

    def _take_listed(self) -> None:
        """Takes in what the lower tier was found to hold."""
        if self._lower is not None and self._is_open:
            found = self._manager.restore(self._lower.named.name, self._lower.take_listed())
            self._listed_pages += found * self._lower.named.chunk_blocks

    def _tell_transfer(self, tier: str, is_read: bool, pages: int, started: float) -> None:
        if pages:
            num_bytes = pages * self._store.row_bytes
            self._watcher.on_transfer(Transfer(tier, is_read, pages, num_bytes, self._clock() - started))
