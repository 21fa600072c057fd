"""Which bytes make up one physical block when KV cache groups lay their layers over each other. Pure.

A block belongs to one group at a time, and which one may change; copying every byte that any group may use is right for
all of them, and needs no knowledge of the owner. Neighbouring ranges become one, so that a layout which packs a block's
layers together is copied in one piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dynamo_connectors.errors import UnsupportedLayoutError


class Span(NamedTuple):
    """Bytes [start, stop) of block 0 in one storage; those of block `b` lie `b * stride` further on."""

    storage: int
    stride: int
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def cover(spans: Iterable[Span], num_blocks: int) -> list[Span]:
    """The fewest ranges with all bytes of `spans`, in the order of their addresses.

    Raises `UnsupportedLayoutError` when the ranges of one block reach into another block.
    """
    merged: list[Span] = []
    for span in sorted(set(spans)):
        last = merged[-1] if merged else None
        if last is not None and last[:2] == span[:2] and span.start <= last.stop:
            merged[-1] = last._replace(stop=max(last.stop, span.stop))
        else:
            merged.append(span)
    _refuse_mixed_blocks(merged, num_blocks)
    return merged


def _refuse_mixed_blocks(spans: list[Span], num_blocks: int) -> None:
    by_region = sorted(spans, key=lambda span: (span.storage, span.start))
    for index, span in enumerate(by_region):
        reach = span.start + (num_blocks - 1) * span.stride
        for other in by_region[index + 1 :]:
            if other.storage != span.storage or other.start >= reach + span.num_bytes:
                break
            # They run through the same blocks, side by side, if one stride holds both.
            if num_blocks > 1 and (other.stride != span.stride or other.stop - span.start > span.stride):
                raise UnsupportedLayoutError(
                    f"KV cache groups divide the same memory differently ({span} and {other}); "
                    "dynamo cannot tier this model, start without --kv-connector dynamo"
                )
        if num_blocks > 1 and span.num_bytes > span.stride:
            raise UnsupportedLayoutError(f"blocks overlap in memory ({span}); start without --kv-connector dynamo")


def offset_in_row(rows: list[Span], page: Span) -> int:
    """Where the bytes of `page` begin in a host row that holds `rows` one behind the other."""
    part = part_in(rows, page)
    return sum(span.num_bytes for span in rows[:part]) + page.start - rows[part].start


def part_in(rows: list[Span], page: Span) -> int:
    """Which of `rows` holds `page`, whole."""
    for part, span in enumerate(rows):
        if span[:2] == page[:2] and span.start <= page.start and page.stop <= span.stop:
            return part
    raise AssertionError(f"{page} is not covered by {rows}")
