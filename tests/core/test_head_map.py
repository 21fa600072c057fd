"""A model's rows divided among ranks: what is put together from another division is byte for byte the own one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.head_map import HeadPage, Heads

Row = npt.NDArray[np.uint8]


@st.composite
def models(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], int, int]:
    """Layers (times, heads, bytes of a head), and two numbers of ranks that divide the heads of each."""
    heads = draw(st.sampled_from([1, 2, 4, 6, 8, 12]))
    ranks = st.sampled_from([number for number in range(1, heads + 1) if heads % number == 0])
    layer = st.tuples(st.integers(1, 3), st.sampled_from([heads, 2 * heads]), st.sampled_from([1, 4, 6]))
    return draw(st.lists(layer, min_size=1, max_size=3)), draw(ranks), draw(ranks)


def heads_of(layers: list[tuple[int, int, int]], ranks: int, what: str = "") -> Heads:
    pages, offset = [], 0
    for times, heads, head_bytes in layers:
        pages.append(HeadPage(offset, times, heads // ranks, head_bytes))
        offset += pages[-1].num_bytes
    return Heads(tuple(pages), what)


def rows_of(layers: list[tuple[int, int, int]], ranks: int) -> list[Row]:
    """The row of every rank: of each layer its heads, every byte another one as far as bytes go."""
    numbers, rows = np.random.default_rng(1), []
    whole = [numbers.integers(0, 256, shape, dtype=np.uint8) for shape in layers]
    for rank in range(ranks):
        mine = [np.split(layer, ranks, axis=1)[rank].ravel() for layer in whole]
        rows.append(np.concatenate(mine))
    return rows


@given(models())
def test_rows_put_together_from_another_division_are_the_own_ones(
    model: tuple[list[tuple[int, int, int]], int, int],
) -> None:
    layers, ranks, among = model
    own, others, heads = rows_of(layers, ranks), rows_of(layers, among), heads_of(layers, ranks)
    read = [0] * among
    for rank in range(ranks):
        row, filled = np.zeros_like(own[rank]), np.zeros(len(own[rank]), dtype=np.int64)
        for part in heads.parts(rank, ranks, among):
            assert part.row_bytes == len(others[part.rank])
            read[part.rank] += 1
            for there, here, num_bytes in part.pieces:
                assert there + num_bytes <= part.row_bytes
                row[here : here + num_bytes] = others[part.rank][there : there + num_bytes]
                filled[here : here + num_bytes] += 1
        assert (filled == 1).all(), "a byte comes from nowhere, or twice"
        assert (row == own[rank]).all()
    told = {part.rank: part.readers for rank in range(ranks) for part in heads.parts(rank, ranks, among)}
    assert read == [told[peer] for peer in range(among)], "a rank is not told how many read it"


@given(models())
def test_engines_that_divide_the_same_heads_have_one_fingerprint(
    model: tuple[list[tuple[int, int, int]], int, int],
) -> None:
    layers, ranks, among = model
    print_of = heads_of(layers, ranks).fingerprint(ranks)
    assert print_of == heads_of(layers, among).fingerprint(among)
    assert print_of != heads_of(layers, ranks, "other").fingerprint(ranks)
    times, heads, head_bytes = layers[0]
    for other in ((times + 1, heads, head_bytes), (times, 2 * heads, head_bytes), (times, heads, head_bytes + 1)):
        assert print_of != heads_of([other, *layers[1:]], ranks).fingerprint(ranks)


def test_heads_that_cannot_be_divided_among_so_many_ranks_lie_nowhere() -> None:
    heads = heads_of([(2, 4, 8)], 2)
    assert not heads.parts(0, 2, 8), "more ranks than heads"
    assert not heads.parts(0, 2, 3)
    assert heads.parts(0, 2, 4)


def test_layers_that_share_one_page_are_read_once() -> None:
    page = HeadPage(0, 2, 1, 8)
    (part, other) = Heads((page, page), "").parts(0, 1, 1) * 2
    assert part == other
    assert [piece.here for piece in part.pieces] == [0, 8]
