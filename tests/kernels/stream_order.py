"""Streams and events that only write down what is asked of them, and a judge of what they wrote down.

Two operations that touch the same memory, one of them writing, must be ordered: by their stream, by an event recorded
after one and waited for before the other, or through the host. `races` finds the pairs that are not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """A kernel or a copy: its name, and what it reads and writes."""

    name: str
    stream: int
    number: int
    reads: frozenset[Hashable]
    writes: frozenset[Hashable]
    #: The newest work of every stream that is certainly done before this starts.
    after: dict[int, int]

    def follows(self, other: Work) -> bool:
        return self.after.get(other.stream, -1) >= other.number

    def conflicts(self, other: Work) -> bool:
        return bool(self.writes & (other.reads | other.writes) or self.reads & other.writes)


@dataclass
class Tape:
    """Everything recorded. `ignore_wait` drops the n-th wait (stream or host), to show that it was needed."""

    ignore_wait: int | None = None
    works: list[Work] = field(default_factory=list)
    waits: int = 0
    streams: int = 0
    #: What the host has waited for: work submitted later starts after it.
    host: dict[int, int] = field(default_factory=dict)

    def stream(self) -> Stream:
        self.streams += 1
        return Stream(self, self.streams - 1)

    def heeds_wait(self) -> bool:
        self.waits += 1
        return self.waits - 1 != self.ignore_wait

    def races(self) -> list[tuple[str, str]]:
        """The names of every unordered pair that touches the same memory."""
        found = []
        for later, second in enumerate(self.works):
            for first in self.works[:later]:
                if second.conflicts(first) and not second.follows(first):
                    found.append((first.name, second.name))
        return found


class Event:
    """A point in a stream."""

    def __init__(self, tape: Tape, done: dict[int, int]) -> None:
        self._tape, self.done = tape, done

    def synchronize(self) -> None:
        if self._tape.heeds_wait():
            _merge(self._tape.host, self.done)

    def record(self, stream: Stream) -> None:
        self.done = stream.record_event().done


class Stream:
    """The part of `torch.cuda.Stream` that our code uses."""

    def __init__(self, tape: Tape, number: int) -> None:
        self._tape, self.number = tape, number
        self.clock: dict[int, int] = {}

    def work(self, name: str, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()) -> None:
        _merge(self.clock, self._tape.host)
        number = self.clock.get(self.number, -1) + 1
        self._tape.works.append(Work(name, self.number, number, frozenset(reads), frozenset(writes), dict(self.clock)))
        self.clock[self.number] = number

    def record_event(self, event: Event | None = None) -> Event:
        done = Event(self._tape, dict(self.clock))
        if event is not None:
            event.done = done.done
        return event or done

    def wait_event(self, event: Event) -> None:
        if self._tape.heeds_wait():
            _merge(self.clock, event.done)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


def _merge(into: dict[int, int], other: dict[int, int]) -> None:
    for stream, number in other.items():
        into[stream] = max(into.get(stream, -1), number)
