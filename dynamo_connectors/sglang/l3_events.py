"""What routers hear of the tiers below SGLang's own: blocks stored and removed, for SGLang's own event stream. Pure.

A block is announced with its tokens and its parent once SGLang has shown them to us, which it does when a prompt is
looked up. A block without them (generated tokens, a prompt too short to be looked up) is announced by its hash alone:
routers then add our medium to a block that they know from SGLang's own events.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import NVME_SSD, OBJECT_STORE

#: SGLang's word for each tier.
MEDIA = {NVME_SSD: "DISK", OBJECT_STORE: "EXTERNAL"}
STORED, REMOVED = "stored", "removed"
#: Blocks whose tokens are remembered.
_MAX_DESCRIBED = 16384
#: Blocks that wait to be announced; more means that nobody listens, and the oldest are dropped.
_MAX_WAITING = 65536


class _Described(NamedTuple):
    parent: BlockKey | None
    tokens: tuple[int, ...]


class _Note(NamedTuple):
    kind: str
    medium: str
    key: BlockKey


@dataclass(frozen=True)
class Stored:
    """A run of blocks, each the parent of the next. `tokens` covers them all, or is empty."""

    keys: tuple[BlockKey, ...]
    parent: BlockKey | None
    tokens: tuple[int, ...]
    medium: str


@dataclass(frozen=True)
class Removed:
    keys: tuple[BlockKey, ...]
    medium: str


class TierEvents:
    """Not thread-safe: its owner serialises the calls."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._described: OrderedDict[BlockKey, _Described] = OrderedDict()
        #: Per medium: block -> whether it was announced with its tokens.
        self._here: dict[str, dict[BlockKey, bool]] = {medium: {} for medium in MEDIA.values()}
        self._waiting: list[_Note] = []

    def describe(self, keys: Sequence[BlockKey], tokens: Sequence[int], parent: BlockKey | None) -> None:
        """A chain as SGLang looked it up. Those of its blocks that are here, and unknown by tokens, are announced."""
        size = self.page_tokens
        for index, key in enumerate(keys[: len(tokens) // size]):
            self._described[key] = _Described(parent, tuple(tokens[index * size : (index + 1) * size]))
            self._described.move_to_end(key)
            parent = key
        while len(self._described) > _MAX_DESCRIBED:
            self._described.popitem(last=False)
        for medium, here in self._here.items():
            for key in keys:
                if here.get(key) is False:
                    self._wait(STORED, medium, key)

    def note(self, kind: str, tier: str, key: BlockKey) -> None:
        """A block appeared in a tier, or left it."""
        medium = MEDIA[tier]
        here = self._here[medium]
        if kind == REMOVED:
            here.pop(key, None)
        else:
            here[key] = False
        self._wait(kind, medium, key)

    def recovered(self, tier: str, keys: Iterable[BlockKey]) -> None:
        """Blocks of an earlier life. Nobody knows their hashes, so they are announced when they are looked up."""
        self._here[MEDIA[tier]].update(dict.fromkeys(keys, False))

    def routers_forgot(self) -> None:
        """SGLang has announced that all is cleared, which routers take for ours too: announce what is looked up."""
        for here in self._here.values():
            here.update(dict.fromkeys(here, False))

    def take(self) -> list[Stored | Removed]:
        """What to announce, in order."""
        waiting, self._waiting = self._waiting, []
        events: list[Stored | Removed] = []
        for (kind, medium), notes in groupby(waiting, lambda note: (note.kind, note.medium)):
            keys = [note.key for note in notes]
            events += [Removed(tuple(keys), medium)] if kind == REMOVED else self._stored(keys, medium)
        return events

    def check(self) -> None:
        assert len(self._described) <= _MAX_DESCRIBED, "more blocks are described than fit"
        assert len(self._waiting) <= _MAX_WAITING, "more blocks wait than fit"

    def _wait(self, kind: str, medium: str, key: BlockKey) -> None:
        self._waiting.append(_Note(kind, medium, key))
        if len(self._waiting) > _MAX_WAITING:
            del self._waiting[: _MAX_WAITING // 2]

    def _stored(self, keys: Sequence[BlockKey], medium: str) -> list[Stored | Removed]:
        """One event for each chain of described blocks, and for each run of undescribed ones."""
        here = self._here[medium]
        runs: list[list[BlockKey]] = []
        for key in keys:
            if here.get(key, True):
                continue  # announced meanwhile, or gone again
            if key in self._described:
                here[key] = True
            if not runs or not self._continues(runs[-1][-1], key):
                runs.append([])
            runs[-1].append(key)
        return [self._event(run, medium) for run in runs]

    def _continues(self, last: BlockKey, key: BlockKey) -> bool:
        described = self._described.get(key)
        return described.parent == last and last in self._described if described else last not in self._described

    def _event(self, run: Sequence[BlockKey], medium: str) -> Stored:
        first = self._described.get(run[0])
        if first is None:
            return Stored(tuple(run), None, (), medium)
        tokens = tuple(token for key in run for token in self._described[key].tokens)
        return Stored(tuple(run), first.parent, tokens, medium)
