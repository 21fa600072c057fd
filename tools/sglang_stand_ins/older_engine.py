"""What the CPU engine of SGLang 0.5.14 lacks beyond 0.5.23's: its page allocator calls Triton on any device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


class _OnCpu:
    """Called like a Triton kernel: `kernel[grid](...)`."""

    def __init__(self, body: Callable[..., None]) -> None:
        self._body = body

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        return self._body


def install() -> None:
    module = importlib.import_module("sglang.srt.mem_cache.allocator.paged")
    module.alloc_extend_kernel = _OnCpu(_extend)  # type: ignore[attr-defined]
    module.alloc_decode_kernel = _OnCpu(_decode)  # type: ignore[attr-defined]


def _extend(first: Any, end: Any, last_slot: Any, free_pages: Any, out: Any, *sizes: int) -> None:
    _fill(zip(first.tolist(), end.tolist(), last_slot.tolist(), strict=True), free_pages, out, page_size=sizes[-1])


def _decode(end: Any, last_slot: Any, free_pages: Any, out: Any, *sizes: int) -> None:
    ends = end.tolist()
    requests = zip((each - 1 for each in ends), ends, last_slot.tolist(), strict=True)
    _fill(requests, free_pages, out, page_size=sizes[-1])


def _fill(requests: Any, free_pages: Any, out: Any, page_size: int) -> None:
    """Token slots: behind the last one within a page, else the next free page."""
    taken = written = 0
    for first, end, slot in requests:
        for position in range(first, end):
            if position % page_size == 0:
                slot = int(free_pages[taken]) * page_size if taken < len(free_pages) else 0
                taken += 1
            else:
                slot += 1
            out[written] = slot
            written += 1
