"""Which bytes of which buffers a READ between two SGLang engines moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.sglang.handoff_layout import EngineLayout, Welcome, layout_of, pieces

_PAGES, _ROWS = 12, 3
_PAGE_BYTES, _ROW_BYTES = (8, 4), (5, 2)


def memory(seed: int, pages: int = _PAGES) -> tuple[EngineLayout, list[np.ndarray]]:
    random = np.random.default_rng(seed)
    sizes = [*(pages * size for size in _PAGE_BYTES), *(_ROWS * size for size in _ROW_BYTES)]
    buffers = [random.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    at = [(buffer.ctypes.data, buffer.nbytes) for buffer in buffers]
    split = len(_PAGE_BYTES)
    page_buffers = [(*where, size) for where, size in zip(at[:split], _PAGE_BYTES, strict=True)]
    return layout_of(page_buffers, [(*at[split + i], size) for i, size in enumerate(_ROW_BYTES)]), buffers


def item(layout: EngineLayout, buffers: list[np.ndarray], slot: int) -> bytes:
    if slot < layout.pages:
        parts, at = zip(buffers[:2], _PAGE_BYTES, strict=True), slot
    else:
        parts, at = zip(buffers[2:], _ROW_BYTES, strict=True), slot - layout.pages
    return b"".join(buffer[at * size : (at + 1) * size].tobytes() for buffer, size in parts)


@given(
    st.lists(st.integers(0, _PAGES - 1), unique=True, max_size=_PAGES),
    st.permutations(range(_PAGES + 4)),
    st.integers(0, _ROWS - 1),
    st.integers(0, _ROWS - 1),
)
def test_every_page_and_the_metadata_arrive_where_they_shall(
    mine: list[int], order: list[int], my_row: int, their_row: int
) -> None:
    here, my_buffers = memory(1)
    there, their_buffers = memory(2, pages=_PAGES + 4)
    before = {slot: item(here, my_buffers, slot) for slot in range(here.slots)}
    into = [*mine, here.metadata_slot(my_row)]
    out_of = [*order[: len(mine)], there.metadata_slot(their_row)]
    found = pieces(here, there, into, out_of)
    assert found is not None
    addresses = {buffer.ctypes.data: buffer for buffer in (*my_buffers, *their_buffers)}
    for to, source, size in zip(*found, strict=True):
        view(addresses, to, size)[:] = view(addresses, source, size)
    moved = dict(zip(into, out_of, strict=True))
    for slot in range(here.slots):
        wanted = item(there, their_buffers, moved[slot]) if slot in moved else before[slot]
        assert item(here, my_buffers, slot) == wanted


def view(buffers: dict[int, np.ndarray], address: int, size: int) -> np.ndarray:
    """Fails for bytes outside every buffer."""
    base = next(base for base, buffer in buffers.items() if base <= address and address + size <= base + buffer.nbytes)
    return buffers[base][address - base : address - base + size]


def test_neighbours_are_one_piece_per_buffer() -> None:
    here, _ = memory(1)
    found = pieces(here, here, [2, 3, 4, 8], [5, 6, 7, 1])
    assert found is not None
    assert found[2] == [24, 12, 8, 4]


@pytest.mark.parametrize(("mine", "theirs"), [([-1], [0]), ([0], [_PAGES]), ([_PAGES], [0]), ([15], [15]), ([0], [99])])
def test_a_slot_that_is_none_is_no_read(mine: list[int], theirs: list[int]) -> None:
    here, _ = memory(1)
    assert pieces(here, here, mine, theirs) is None


def test_what_a_peer_says_of_itself_is_read_or_refused() -> None:
    here, _ = memory(1)
    encoded = Welcome(b"nixl", here).encode()
    assert Welcome.decode(encoded) == Welcome(b"nixl", here)
    for garbled in (encoded[:-3], b"", b"\xc1", encoded + b"x"):
        with pytest.raises(StoreError):
            Welcome.decode(garbled)
    lame = EngineLayout(2, (1, 2), (8,), 1, (), ())
    with pytest.raises(StoreError, match="cannot be read"):
        Welcome.decode(Welcome(b"nixl", lame).encode())


def test_an_engine_without_pages_is_refused() -> None:
    with pytest.raises(ConfigError, match="no KV in pages"):
        layout_of([], [(0, 8, 8)])
