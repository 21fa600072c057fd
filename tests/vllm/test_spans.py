"""The bytes of one physical block over all groups: all of them, once, and nobody else's."""

from __future__ import annotations

import pytest

from dynamo_connectors.errors import UnsupportedLayoutError
from dynamo_connectors.vllm.spans import Span, cover, offset_in_row

N = 10


def test_groups_that_lie_over_each_other_are_copied_once() -> None:
    layer_a, layer_b = Span(0, 100, 0, 100), Span(0, 100, 1000, 1100)
    assert cover([layer_a, layer_b, layer_a], N) == [layer_a, layer_b]


def test_layers_that_lie_side_by_side_become_one_range() -> None:
    pages = [Span(0, 400, 0, 100), Span(0, 400, 100, 200), Span(0, 400, 0, 150), Span(0, 400, 150, 300)]
    assert cover(pages, N) == [Span(0, 400, 0, 300)]


def test_padding_between_layers_is_left_out() -> None:
    assert cover([Span(0, 400, 0, 100), Span(0, 400, 200, 300)], N) == [Span(0, 400, 0, 100), Span(0, 400, 200, 300)]


def test_other_storages_are_other_ranges() -> None:
    assert len(cover([Span(0, 100, 0, 100), Span(1, 100, 0, 100)], N)) == 2


@pytest.mark.parametrize(
    "pages",
    [
        [Span(0, 100, 0, 100), Span(0, 200, 0, 200)],  # two block sizes over the same bytes
        [Span(0, 100, 0, 60), Span(0, 100, 60, 160)],  # a page that reaches into the next block
        [Span(0, 100, 0, 100), Span(0, 100, 500, 600)],  # one group's block 5 is another's block 0
    ],
)
def test_blocks_that_reach_into_each_other_are_refused(pages: list[Span]) -> None:
    with pytest.raises(UnsupportedLayoutError):
        cover(pages, N)


def test_every_page_has_its_place_in_the_row() -> None:
    rows = cover([Span(0, 400, 0, 100), Span(0, 400, 100, 200), Span(0, 400, 250, 300)], N)
    assert offset_in_row(rows, Span(0, 400, 100, 200)) == 100
    assert offset_in_row(rows, Span(0, 400, 250, 300)) == 200
