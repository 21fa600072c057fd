"""What the reader's machine remembers, and the instructions that it gives. Plain records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport.messages import Ask, Check, Done, Grant, Request, Welcome

#: A message is sent again when its answer takes longer.
FIRST_RESEND_SECONDS = 0.02
LAST_RESEND_SECONDS = 0.5
_PING_SECONDS = 0.5

Peer: TypeAlias = str


class Send(NamedTuple):
    peer: Peer
    message: Request


class Connect(NamedTuple):
    """Load the peer's metadata; answer with `connected`."""

    peer: Peer
    welcome: Welcome


class Disconnect(NamedTuple):
    peer: Peer


class Post(NamedTuple):
    """Start a READ of `slots` into the places `rows` of the read's buffers; answer with `transfer_ended`."""

    read: int
    peer: Peer
    rows: tuple[int, ...]
    slots: tuple[int, ...]


class Look(NamedTuple):
    """Start a READ of the words of `slots`, and of `run`; answer with `transfer_ended`. `rows` are its rows still."""

    read: int
    peer: Peer
    rows: tuple[int, ...]
    slots: tuple[int, ...]


class Finish(NamedTuple):
    """For each block of the read why it is missing, or None. Its buffers are nobody's any more."""

    read: int
    reasons: tuple[str | None, ...]


class GiveUp(NamedTuple):
    """Nobody shall wait for this READ any more. It still has its buffers; its `Finish` comes when it has ended."""

    read: int


class Forget(NamedTuple):
    """Nobody has asked for this peer for long: hang up."""

    peer: Peer


class Restart(NamedTuple):
    """Destroy the data plane and make a new one; answer with `restarted`."""


Instruction: TypeAlias = Send | Connect | Disconnect | Post | Look | Finish | GiveUp | Forget | Restart


class Common(NamedTuple):
    """What this reader is, and what it must have in common with its peers."""

    name: bytes
    namespace: bytes
    row_bytes: int
    quarantine_bytes: int
    #: Nonces count from here on. Random, so that no answer to another reader or run answers a question of this one.
    first: int
    #: An owner that has never heard of a lease may hear of it so much later; then it has lost it.
    unknown_seconds: float = 1.0
    #: A peer of which nothing is heard for so long is not waited for, whatever it was doing.
    silence_seconds: float = 2.0
    #: While the owner says that the blocks are still on their way, the deadline of a read is not counted.
    is_patient: bool = False
    #: As `quarantine_bytes`, of the rows that peers' windows are read into.
    window_quarantine_bytes: int = 0
    #: How many ranks of this engine read each of its peers' ranks: each has an end of its own to tell.
    readers: int = 1


class Wanted(NamedTuple):
    """Blocks of a lease: those in its owner's window, or else in its host memory."""

    lease: bytes
    keys: tuple[BlockKey, ...]
    in_window: bool = False


@dataclass
class Timer:
    """When to send again, ever more seldom."""

    due: float
    pause: float = FIRST_RESEND_SECONDS

    def is_due(self, now: float) -> bool:
        if now < self.due:
            return False
        self.pause = min(2 * self.pause, LAST_RESEND_SECONDS)
        self.due = now + self.pause
        return True


@dataclass
class Read:
    number: int
    peer: Peer
    wanted: Wanted
    started: float
    deadline: float
    timer: Timer
    state: str = "connecting"
    epoch: bytes = b""
    reasons: list[str | None] = field(default_factory=list)
    rows: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    run: int = 0
    late_since: float = 0.0

    @property
    def is_under_way(self) -> bool:
        """NIXL may write to its rows or its words, and somebody waits for it."""
        return self.state in ("reading", "looking")

    @property
    def late_rows(self) -> int:
        """Rows that it may still write to, and nobody waits for."""
        return len(self.rows) if self.state == "late" else 0

    def question(self, reader: bytes, now: float) -> Ask | Check:
        lease, keys, in_window = self.wanted
        if self.state == "checking":
            return Check(reader, self.number, self.epoch, lease, self.slots, self.generations)
        seconds = max(0.0, min(600.0, self.deadline - now))
        return Ask(reader, self.number, self.epoch, lease, keys, seconds, in_window)

    def last_word(self, reader: bytes) -> Done:
        return Done(reader, self.number, self.wanted.lease)

    def accept(self, grant: Grant) -> None:
        self.reasons = ["gone" if slot < 0 else None for slot in grant.slots]
        self.rows = tuple(row for row, slot in enumerate(grant.slots) if slot >= 0)
        self.slots = tuple(grant.slots[row] for row in self.rows)
        self.generations = tuple(grant.generations[row] for row in self.rows)
        self.run = grant.run

    def judge(self, words: Sequence[int]) -> str:
        """`words`: `run` and generations after the READ. Notes what is stale, and returns why, or nothing."""
        held = words[0] == self.run
        for row, before, after in zip(self.rows, self.generations, words[1:], strict=True):
            if not held or before != after:
                self.reasons[row] = "stale"
        return "revoked" if not held else "other_generation" if "stale" in self.reasons else ""

    def count_anew(self, now: float) -> None:
        """Its time begins now."""
        self.started, self.deadline = now, now + self.deadline - self.started


def is_over_budget(reads: Iterable[Read], common: Common) -> bool:
    """Whether late reads keep too much memory. Windows' rows have a budget of their own: a read of them is large."""
    late = [0, 0]
    for read in reads:
        late[read.wanted.in_window] += read.late_rows * common.row_bytes
    return late[0] > common.quarantine_bytes or late[1] > common.window_quarantine_bytes


@dataclass
class KnownPeer:
    #: absent, greeting, loading (its metadata), ready or refused.
    state: str = "absent"
    nonce: int = 0
    timer: Timer = field(default_factory=lambda: Timer(0.0))
    epoch: bytes = b""
    #: In the window or not -> how many there are.
    rows: tuple[int, int] = (0, 0)
    has_words: bool = False
    reason: str = ""
    #: Refused: when it is asked again.
    retry_at: float = 0.0
    used_at: float = 0.0
    #: Something is to come from it, and nothing has since then.
    quiet_since: float | None = None
    ping_at: float = 0.0
    silence_seconds: float = 2.0

    def greet(self, nonce: int, now: float) -> None:
        self.state, self.nonce, self.timer, self.quiet_since = "greeting", nonce, Timer(now), now
        self.timer.is_due(now)

    def welcome(self, welcome: Welcome) -> None:
        self.state, self.epoch, self.quiet_since = "loading", welcome.epoch, None
        self.has_words = welcome.words is not None
        # What lies in a window cannot be asked about.
        self.rows = welcome.rows, welcome.window.rows if welcome.window is not None and self.has_words else 0

    def refuse(self, reason: str, retry_at: float) -> None:
        self.state, self.reason, self.retry_at, self.quiet_since = "refused", reason, retry_at, None

    def listen(self, now: float, is_asked: bool, was_away: bool) -> str:
        """`silent` when it owes us a word and says none, `ping` when it shall be asked for one."""
        if not is_asked or self.state not in ("greeting", "ready"):
            self.quiet_since = None
        elif self.quiet_since is None or was_away:
            self.quiet_since = now
        elif now - self.quiet_since >= self.silence_seconds:
            return "silent"
        elif self.state == "ready" and now - self.quiet_since >= _PING_SECONDS and now >= self.ping_at:
            self.ping_at = now + _PING_SECONDS
            return "ping"
        return ""
