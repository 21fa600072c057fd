"""The reader's half of the protocol: from "these blocks, please" to bytes that are proven, or to a miss. Pure.

Life of a read:  connecting -> asking -> reading -> looking -> ended
                 ... reading -> checking -> ended, where the owner has no words to look at
                 reading or looking, and out of time or its peer silent: late -> ended

Calls and messages are events; what is to be done comes out as instructions (`take`). A block counts as loaded only
when, after the READ, its slot's generation was read as well and was still what the owner had granted: an owner counts
before it writes, so bytes of something else come with another generation. An owner without words is asked instead.
Memory that a READ may write to is quarantined until the READ has ended: a read that is late keeps its buffers, and its
peer gets no new READs, until NIXL says DONE or that the peer is gone. When late reads hold more bytes than the budget,
or one for a minute, the data plane is restarted, which fences all of them at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dynamo_connectors.transport.messages import Grant, Hello, Ping, Pong, Refuse, Reply, Request, Verdict, Welcome
from dynamo_connectors.transport.reader_state import (
    Common,
    Connect,
    Disconnect,
    Finish,
    Forget,
    GiveUp,
    Instruction,
    KnownPeer,
    Look,
    Peer,
    Post,
    Read,
    Restart,
    Send,
    Timer,
    Wanted,
    is_over_budget,
)
from dynamo_connectors.transport.watches import Watches

#: Who has not looked for so long cannot tell whether others were silent.
_ABSENCE_SECONDS = 1.0
#: A peer that refused is asked again after so long, one that was silent after so little.
_REFUSED_SECONDS = 10.0
_SILENT_SECONDS = 3.0
#: A READ that is late for so long never ends by itself.
_HUNG_SECONDS = 60.0
_FORGET_SECONDS = 600.0
_LOOK_SECONDS = 10.0


class Reader:
    """One per worker. `now` is in seconds and never runs backwards."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self._peers: dict[Peer, KnownPeer] = {}
        self._reads: dict[int, Read] = {}
        self._watches = Watches(common.name, common.readers)
        self._out: list[Instruction] = []
        self._nonce = common.first
        self._restarting = False
        self._looked_at = float("-inf")
        self._forget_at = float("-inf")
        #: What happened since the last look, by (what, label).
        self.counts: Counter[tuple[str, str]] = Counter()
        #: Lines for the operator: a peer that refuses us, and why.
        self.complaints: list[str] = []

    def take(self) -> list[Instruction]:
        out, self._out = self._out, []
        return out

    @property
    def quarantined_bytes(self) -> int:
        return sum(read.late_rows for read in self._reads.values()) * self._common.row_bytes

    @property
    def is_reading(self) -> bool:
        """Whether a READ may end any moment that somebody waits for."""
        return any(read.is_under_way for read in self._reads.values())

    # -- the engine's side -------------------------------------------------------------------------------------------

    def read(self, number: int, peer: Peer, wanted: Wanted, deadline: float, now: float) -> None:
        """`number` is new for every read. Ends with one `Finish`."""
        read = Read(number, peer, wanted, now, deadline, Timer(now), reasons=[None] * len(wanted.keys))
        self._reads[number] = read
        if any(other.state == "late" for other in self._reads.values() if other.peer == peer):
            self._finish(read, "unavailable")
        elif (why := self._greet(peer, now)) is not None:
            self._finish(read, why)
        elif self._peers[peer].state == "ready":
            self._start_asking(read, now)

    def watch(self, peer: Peer, lease: bytes, now: float) -> None:
        """Keeps a lease alive while its request waits for its turn, and meets its owner meanwhile."""
        self._watches.watch(peer, lease, now)
        self._greet(peer, now)
        self.tick(now)

    def unwatch(self, lease: bytes, now: float) -> None:
        """The owner may have its blocks back."""
        self._watches.unwatch(lease, now)
        self.tick(now)

    def abandon(self, lease: bytes) -> None:
        """Nobody waits for its reads any more: those that are not under way end."""
        for read in [read for read in self._reads.values() if read.wanted.lease == lease]:
            if not read.is_under_way and read.state != "late":
                self._finish(read, "unwanted")

    def isolate(self, namespace: bytes) -> None:
        """From now on it has this in common with its peers. Nothing is asked of those it has met; READs go on."""
        self._common = self._common._replace(namespace=namespace)
        for name, peer in self._peers.items():
            self._out += [Disconnect(name)] if peer.state == "ready" else []
            peer.state = "absent"
        for read in list(self._reads.values()):
            if read.state in ("connecting", "asking"):
                self._finish(read, "refused")

    def tick(self, now: float) -> None:
        """What is due by now. Call it at least at `next_due`, after what has come was received."""
        was_away, self._looked_at = now - self._looked_at > _ABSENCE_SECONDS, now
        asked = {read.peer for read in self._reads.values() if read.state not in ("connecting", "late")}
        for name, peer in self._peers.items():
            if peer.state == "greeting" and peer.timer.is_due(now):
                self._hail(name, peer)
            heard = peer.listen(now, name in asked or peer.state == "greeting", was_away)
            if heard == "silent":
                self._silent(name, now)
            elif heard == "ping":
                self._send(name, Ping(self._common.name))
        for read in list(self._reads.values()):
            if read.state == "late":
                if now - read.late_since >= _HUNG_SECONDS:
                    self._restart()
            elif now >= read.deadline:
                self._out_of_time(read, now)
            elif read.state in ("asking", "checking") and read.timer.is_due(now):
                self._ask(read, now)
        in_use = (read.wanted.lease for read in self._reads.values() if read.state != "late")
        self._out += self._watches.tick(in_use, now)
        self._forget(now)

    def next_due(self, now: float) -> float:
        """When `tick` has something to do, half a second ahead at most."""
        due = [now + _ABSENCE_SECONDS / 2, self._watches.next_due()]
        due += [peer.timer.due for peer in self._peers.values() if peer.state == "greeting"]
        due += [read.deadline for read in self._reads.values() if read.state != "late"]
        due += [read.timer.due for read in self._reads.values() if read.state in ("asking", "checking")]
        return min(due)

    # -- the peers' side ---------------------------------------------------------------------------------------------

    def receive(self, peer: Peer, reply: Reply, now: float) -> None:
        if isinstance(reply, (Welcome, Refuse)):
            self._answered(peer, reply, now)
            return
        if (known := self._peers.get(peer)) is not None and known.quiet_since is not None:
            known.quiet_since = now
        if isinstance(reply, Pong):
            return
        if reply.reader != self._common.name:
            self.counts["nixl_refused_messages", "other_reader"] += 1
            return
        read = self._reads.get(reply.read)
        if read is None or read.peer != peer or read.state not in ("asking", "checking"):
            return  # came twice, or too late: a READ that is under way ends by the data plane's word alone
        if reply.epoch != read.epoch:
            self._lost(read.peer, read, "restarted")
        elif isinstance(reply, Grant) and read.state == "asking":
            self._granted(read, reply, now)
        elif isinstance(reply, Verdict) and read.state == "checking":
            if not reply.held:
                self.counts["nixl_fences_refused", reply.reason or "refused"] += 1
            self._finish(read, None if reply.held else "stale")

    def connected(self, peer: Peer, epoch: bytes, error: str | None, now: float) -> None:
        """The data plane has loaded the metadata of that run of the peer, or why it could not."""
        known = self._peers.get(peer)
        if known is None or known.state != "loading" or known.epoch != epoch:
            return
        if error is not None:
            self._refused(peer, "bad_metadata", error, now + _REFUSED_SECONDS)
            return
        known.state, known.quiet_since = "ready", None
        for read in self._waiting_for(peer):
            self._start_asking(read, now)

    def transfer_ended(self, number: int, error: str | None, now: float, words: Sequence[int] = ()) -> None:
        """A READ is over for good: nothing writes to its buffers any more. `words`: what a `Look` has seen."""
        read = self._reads.get(number)
        if read is None:
            return
        if read.state == "late":
            self._finish(read, "timeout")
        elif error is not None and read.is_under_way:
            self._lost(read.peer, read, error)
        elif read.state == "looking":
            self._looked(read, words)
        elif read.state == "reading":
            self._prove(read, now)

    def restarted(self, now: float) -> None:
        """All READs have ended with the old data plane."""
        self._restarting = False
        for read in list(self._reads.values()):
            if read.is_under_way or read.state == "late":
                self._finish(read, "timeout" if read.state == "late" else "unavailable")
        for peer in self._peers.values():
            if peer.state in ("ready", "loading"):
                peer.state = "absent"
        for read in list(self._reads.values()):  # still connecting, asking or checking
            if read.state == "checking":
                continue  # its bytes are here
            read.state = "connecting"
            why = self._greet(read.peer, now)
            if why is not None:
                self._finish(read, why)

    def check(self) -> None:
        """Asserts every invariant."""
        for read in self._reads.values():
            posted = read.state in ("reading", "looking", "checking", "late")
            assert posted == bool(read.slots), f"a read is {read.state} with {len(read.slots)} slots"
            assert len(read.slots) == len(read.generations) == len(read.rows), "slots, generations and rows differ"
        self._watches.check()
        over = is_over_budget(self._reads.values(), self._common)
        assert not over or self._restarting, "late reads hold more than the budget and nothing is done about it"

    # -- peers -------------------------------------------------------------------------------------------------------

    def _greet(self, name: Peer, now: float) -> str | None:
        """Sees to it that a connection is on its way; the reason when there is none to be had now."""
        peer = self._peers.setdefault(name, KnownPeer(silence_seconds=self._common.silence_seconds))
        peer.used_at = now
        if peer.state == "refused":
            if now < peer.retry_at:
                return peer.reason
            peer.state = "absent"
        if peer.state == "absent":
            self._nonce += 1
            peer.greet(self._nonce, now)
            self._hail(name, peer)
        return None

    def _hail(self, name: Peer, peer: KnownPeer) -> None:
        self._send(name, Hello(peer.nonce, self._common.namespace, self._common.row_bytes))

    def _answered(self, name: Peer, reply: Welcome | Refuse, now: float) -> None:
        peer = self._peers.get(name)
        if peer is None or peer.state != "greeting" or peer.nonce != reply.nonce:
            return
        if isinstance(reply, Welcome) and reply.namespace != self._common.namespace:
            self.counts["nixl_refused_messages", "other_namespace"] += 1
            return
        if isinstance(reply, Refuse):
            self._refused(name, reply.reason, reply.detail, now + _REFUSED_SECONDS)
        elif reply.row_bytes != self._common.row_bytes:
            self._refused(name, "other_block_size", f"its blocks have {reply.row_bytes} bytes", now + _REFUSED_SECONDS)
        else:
            peer.welcome(reply)
            self._out.append(Connect(name, reply))

    def _refused(self, name: Peer, reason: str, detail: str, retry_at: float) -> None:
        self._peers[name].refuse("refused", retry_at)
        self.counts["nixl_refused_peers", reason] += 1
        self.complaints.append(f"peer {name} cannot be read: {detail}")
        for read in self._waiting_for(name):
            self._finish(read, "refused")

    def _lost(self, name: Peer, read: Read, reason: str) -> None:
        """The peer is not who it was, or gone: the next read meets it anew."""
        self._finish(read, reason)  # first: whoever waits for it does not wait for NIXL's leave-taking
        peer = self._peers[name]
        if peer.state == "ready" and peer.epoch == read.epoch:
            peer.state = "absent"
            self._out.append(Disconnect(name))

    def _silent(self, name: Peer, now: float) -> None:
        """It is asked again soon, but requests do not wait for it meanwhile."""
        peer = self._peers[name]
        was_ready = peer.state == "ready"
        peer.refuse("unreachable", now + _SILENT_SECONDS)
        self.counts["nixl_silent_peers", ""] += 1
        self.complaints.append(
            f"peer {name} answers no more; its blocks are computed here until it does"
            if was_ready
            else f"peer {name} does not answer: nobody listens there, it has another --kvbm-peer-secret-file, or "
            "another version of dynamo-connectors"
        )
        for read in [read for read in self._reads.values() if read.peer == name and read.state != "late"]:
            if read.is_under_way:
                self._out.append(GiveUp(read.number))
                self._out_of_time(read, now)
            else:
                self._finish(read, "unreachable")
        if was_ready:  # last: whoever waits does not wait for NIXL's leave-taking
            self._out.append(Disconnect(name))

    def _forget(self, now: float) -> None:
        """Addresses come and go with a fleet's engines."""
        if now < self._forget_at:
            return
        self._forget_at = now + _LOOK_SECONDS
        needed = {read.peer for read in self._reads.values()} | self._watches.peers()
        for name, peer in list(self._peers.items()):
            if name not in needed and now - peer.used_at >= _FORGET_SECONDS:
                del self._peers[name]
                self._out.append(Forget(name))

    def _waiting_for(self, name: Peer) -> list[Read]:
        return [read for read in self._reads.values() if read.peer == name and read.state == "connecting"]

    # -- reads -------------------------------------------------------------------------------------------------------

    def _start_asking(self, read: Read, now: float) -> None:
        peer = self._peers[read.peer]
        if not peer.rows[read.wanted.in_window]:
            self._finish(read, "gone")
            return
        read.epoch = peer.epoch
        self._begin_asking(read, "asking", now)

    def _begin_asking(self, read: Read, state: str, now: float) -> None:
        read.state, read.timer = state, Timer(now)
        read.timer.is_due(now)
        self._ask(read, now)

    def _ask(self, read: Read, now: float) -> None:
        self._send(read.peer, read.question(self._common.name, now))

    def _granted(self, read: Read, grant: Grant, now: float) -> None:
        if grant.status == "pending" and self._common.is_patient:
            read.count_anew(now)
        is_new = now - read.started < self._common.unknown_seconds
        if grant.status == "pending" or (grant.status == "unknown" and is_new):
            return  # asked again when the timer says so
        if grant.status != "granted":
            self._finish(read, "gone" if grant.status == "unknown" else grant.status)
            return
        peer = self._peers[read.peer]
        if peer.state != "ready" or peer.epoch != read.epoch:  # we have met its next run meanwhile
            self._finish(read, "restarted")
            return
        known = all(slot < peer.rows[read.wanted.in_window] for slot in grant.slots)
        if not (known and len(grant.slots) == len(grant.generations) == len(read.wanted.keys)):
            self._finish(read, "bad_answer")
            return
        read.accept(grant)
        if not read.rows:
            self._finish(read, None)
            return
        read.state = "reading"
        self._out.append(Post(read.number, read.peer, read.rows, read.slots))

    def _prove(self, read: Read, now: float) -> None:
        peer = self._peers[read.peer]
        if not peer.has_words:
            self._begin_asking(read, "checking", now)
        elif peer.state != "ready" or peer.epoch != read.epoch:
            self._finish(read, "restarted")
        else:
            read.state = "looking"
            self._out.append(Look(read.number, read.peer, read.rows, read.slots))

    def _looked(self, read: Read, words: Sequence[int]) -> None:
        if why := read.judge(words):
            self.counts["nixl_fences_refused", why] += 1
        self._send(read.peer, read.last_word(self._common.name))
        peer = self._peers[read.peer]
        is_same = peer.state == "ready" and peer.epoch == read.epoch  # not after a reset here
        self._finish(read, None if is_same else "restarted")

    def _out_of_time(self, read: Read, now: float) -> None:
        if not read.is_under_way:
            self._finish(read, "timeout")
            return
        read.state, read.late_since = "late", now
        self.counts["nixl_late_reads", ""] += 1
        if is_over_budget(self._reads.values(), self._common):
            self._restart()

    def _restart(self) -> None:
        if not self._restarting:
            self._restarting = True
            self.counts["nixl_restarts", ""] += 1
            self._out.append(Restart())

    def _finish(self, read: Read, reason: str | None) -> None:
        del self._reads[read.number]
        if reason is not None:
            read.reasons = [reason if known is None else known for known in read.reasons]
        self._out.append(Finish(read.number, tuple(read.reasons)))

    def _send(self, peer: Peer, message: Request) -> None:
        self._out.append(Send(peer, message))
