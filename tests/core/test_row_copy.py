"""Compressed copies on a GPU, as far as their order on the host goes: streams are faked, nothing is copied."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dynamo_kernels import BlockView
from dynamo_kernels.compressed_copy import CompressedCopy
from dynamo_kernels.compression import Codec, Compression, HeadLayout

from dynamo_connectors.row_copy import RowCopy

LAYOUT = HeadLayout(torch.float32, (2, 8, 2, 16), (0, 2))
CODEC = Codec(Compression.INT8, (LAYOUT,))
IDS = np.arange(2)


class FakeStream:
    def __init__(self, awaited: list[str], name: str) -> None:
        self._awaited, self._name = awaited, name

    def synchronize(self) -> None:
        self._awaited.append(self._name)


@pytest.fixture
def awaited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The streams that were waited for, in order."""
    names: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: FakeStream(names, "lane"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream(names, "current"))
    return names


def row_copy() -> RowCopy:
    hbm = BlockView.of_pages([torch.zeros((4, LAYOUT.elements))], [LAYOUT.page_bytes])
    return RowCopy(hbm, np.zeros((4, CODEC.row_bytes), np.uint8), CODEC)


def across(copy: CompressedCopy | None, loads: bool) -> None:
    assert copy is not None
    copy._through_hbm(IDS, IDS, loads)


@pytest.mark.parametrize("loads", [False, True])
def test_what_is_under_way_is_awaited_also_when_the_rest_cannot_start(
    loads: bool, awaited: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(CompressedCopy, "_enqueue", fail)
    with pytest.raises(RuntimeError, match="no kernel"):
        across(row_copy()._loading, loads)
    assert awaited == ["lane", "current"]


def test_a_load_does_not_wait_for_a_store(awaited: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    storing, loaded = threading.Event(), threading.Event()
    seen: list[bool] = []

    def enqueue(_self: Any, _pages: Any, _rows: Any, loads: bool, *_: Any) -> None:
        if not loads:
            storing.set()
            seen.append(loaded.wait(60))

    monkeypatch.setattr(CompressedCopy, "_enqueue", enqueue)
    copy = row_copy()
    store: Callable[[], None] = lambda: across(copy._storing, loads=False)  # noqa: E731
    thread = threading.Thread(target=store)
    thread.start()
    try:
        assert storing.wait(60)
        load = threading.Thread(target=lambda: (across(copy._loading, loads=True), loaded.set()))
        load.start()
        load.join()
    finally:
        thread.join()
    assert seen == [True], "the load came through only when the store was over"


def test_no_blocks_are_no_copy() -> None:
    copy = row_copy()
    copy.up([], [])
    copy.start_down([], [])
