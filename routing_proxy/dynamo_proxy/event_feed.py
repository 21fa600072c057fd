"""One publisher's KV events, live over ZMQ: order watched, gaps asked back from its replay socket, loss
admitted.

The sockets sit directly on the event loop (their descriptor is a plain reader); decoding is kv_events.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

import zmq

from .dialects import EventSource
from .errors import EventDecodeError
from .knowledge import Knowledge
from .kv_events import AllCleared, Order, SequenceTracker, decode_batch
from .kv_index import Outcome
from .metrics import Metrics

_MESSAGES_PER_TURN = 64  # then other work of the loop gets its turn
_MAX_WAITING = 20_000
_END = b"\xff" * 8
log = logging.getLogger("dynamo_proxy")


class _Socket:
    """A ZMQ socket read by callbacks. Its descriptor signals edges, so every wake drains until there is
    nothing.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 20_000)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._on_frames: Callable[[list[bytes]], None] = lambda frames: None
        self._again: asyncio.Handle | None = None
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError:
            self._socket.close()
            raise

    def subscribe(self, topic: str) -> None:
        self._socket.setsockopt(zmq.SUBSCRIBE, topic.encode())

    def read_with(self, on_frames: Callable[[list[bytes]], None]) -> None:
        self._on_frames = on_frames
        self._loop.add_reader(self._descriptor, self._drain)
        self._drain()

    def send(self, frames: list[bytes]) -> None:
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        self._drain()  # sending may eat the edge of a message that came

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.close()

    def _drain(self) -> None:
        self._again = None
        for _ in range(_MESSAGES_PER_TURN):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_frames(frames)
        if not self._socket.closed:
            self._again = self._loop.call_soon(self._drain)


class EventFeed:
    """Applies one source's events to the exact index and knows whether that knowledge is whole.

    complete: every event of the publisher's life was seen. lost: a gap could not be closed (never both).
    """

    def __init__(self, slot: int, source: EventSource, knowledge: Knowledge, metrics: Metrics) -> None:
        self.slot = slot
        self.source = source
        self.complete = False
        self.lost = False
        self._knowledge = knowledge
        self._metrics = metrics
        self._tracker = SequenceTracker()
        self._any_seen = False
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._sub: _Socket | None = None
        self._replay: _Socket | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._replay_seconds = 3.0
        self.on_change: Callable[[], None] = lambda: None

    def start(self, context: zmq.Context[zmq.Socket[bytes]], replay_seconds: float) -> None:
        """Subscribe, and ask for what was published before. Raises zmq.ZMQError for an unusable endpoint."""
        self._replay_seconds = replay_seconds
        self._sub = _Socket(context, zmq.SUB, self.source.endpoint)
        self._sub.subscribe(self.source.topic)
        if self.source.replay_endpoint:
            self._replay = _Socket(context, zmq.DEALER, self.source.replay_endpoint)
            self._replay.read_with(self._on_replayed)
            self._ask_replay(0)
        self._sub.read_with(self._on_live)

    def close(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        for socket in (self._sub, self._replay):
            if socket is not None:
                socket.close()
        self._sub = self._replay = None
        self._waiting.clear()

    def _on_live(self, frames: list[bytes]) -> None:
        if len(frames) < 2 or len(frames[-2]) != 8:
            self._metrics.events.labels("bad_frames").inc()
            return
        sequence = int.from_bytes(frames[-2], "big")
        if self._deadline is None:
            self._take(sequence, frames[-1], may_replay=True)
        elif len(self._waiting) < _MAX_WAITING:
            self._waiting.append((sequence, frames[-1]))
        # else: dropped here, seen as a gap when the waiting ones are taken

    def _on_replayed(self, frames: list[bytes]) -> None:
        if self._deadline is None or len(frames) < 2 or len(frames[-2]) != 8:
            return  # a late answer to a question that was given up
        if frames[-2] == _END:
            self._end_replay("")
            return
        sequence = int.from_bytes(frames[-2], "big")
        if sequence >= self._tracker.expected:
            self._take(sequence, frames[-1], may_replay=False)

    def _ask_replay(self, start: int) -> None:
        assert self._replay is not None
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._replay_seconds, self._end_replay, "replay_timeout")
        with contextlib.suppress(zmq.Again):  # no peer yet: the deadline speaks
            self._replay.send([b"", start.to_bytes(8, "big")])

    def _end_replay(self, failure: str) -> None:
        assert self._deadline is not None
        self._deadline.cancel()
        self._deadline = None
        if failure:
            self._metrics.event_gaps.labels(failure).inc()
        elif not self._any_seen:
            self.complete = True  # asked from 0, and there is nothing
        last = -1
        while self._waiting:
            sequence, payload = self._waiting.popleft()
            if sequence >= self._tracker.expected or sequence <= last:
                self._take(sequence, payload, may_replay=False)
            last = sequence
        self.on_change()

    def _take(self, sequence: int, payload: bytes, may_replay: bool) -> None:
        order = self._tracker.classify(sequence)
        if order is Order.RESTART:
            self._metrics.event_gaps.labels("restart").inc()
            self._forget()
            self._tracker.expected = 0
            self.complete = self.lost = False
            order = self._tracker.classify(sequence)
        if order is Order.GAP:
            if may_replay and self._replay is not None:
                self._metrics.event_gaps.labels("replay").inc()
                self._waiting.append((sequence, payload))
                self._ask_replay(self._tracker.expected)
                return
            if self._any_seen:
                self._lose("lost")
            else:
                self._metrics.event_gaps.labels("late_join").inc()
        elif sequence == 0:
            self.complete, self.lost = True, False
        self._any_seen = True
        self._tracker.accept(sequence)
        self._apply(payload)
        self.on_change()

    def _apply(self, payload: bytes) -> None:
        try:
            events, unknown = decode_batch(payload)
        except EventDecodeError as error:
            self._metrics.events.labels(error.reason).inc()
            self._lose("undecodable")
            return
        if unknown:
            self._metrics.events.labels("unknown_type").inc(unknown)
        for event in events:
            outcome = self._knowledge.exact.apply(self.slot, self.source.rank, event)
            self._metrics.events.labels(outcome.value).inc()
            if isinstance(event, AllCleared):
                self._knowledge.approx.forget_nodes(self.slot)
                self.complete, self.lost = True, False
            elif outcome is Outcome.FULL:
                self._lose("index_full")

    def _lose(self, reason: str) -> None:
        """Events are missing: what we hold may be gone. Forget it and say so; later events are true again."""
        if not self.lost:
            log.warning("KV events from %s lost (%s): routing by sent prompts", self.source.endpoint, reason)
        self._metrics.event_gaps.labels(reason).inc()
        self._knowledge.exact.clear_source(self.slot, self.source.rank)
        self.complete, self.lost = False, True

    def _forget(self) -> None:
        self._knowledge.exact.clear_source(self.slot, self.source.rank)
        self._knowledge.approx.forget_nodes(self.slot)

    def check(self) -> None:
        self._tracker.check()
        assert not (self.complete and self.lost), "a feed is both complete and lost"
        assert len(self._waiting) <= _MAX_WAITING + 1, "too many events wait for a replay"
        assert self._deadline is not None or not self._waiting, "events wait although no replay is under way"
