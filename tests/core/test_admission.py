"""How much of a request may leave HBM."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.admission import admitted_blocks


@pytest.mark.parametrize(
    ("blocks", "ratio", "admitted"),
    [
        (0, 1.0, 0),
        (1, 1.0, 1),
        (1, 0.01, 1),
        (10, 0.5, 5),
        (10, 0.51, 6),
        (10, 0.1, 1),
        (3, 0.3, 1),
        (30, 0.1, 3),
    ],
)
def test_admitted_blocks(blocks: int, ratio: float, admitted: int) -> None:
    assert admitted_blocks(blocks, ratio) == admitted


@given(blocks=st.integers(0, 100_000), hundredths=st.integers(1, 100))
def test_it_is_the_share_rounded_up(blocks: int, hundredths: int) -> None:
    admitted = admitted_blocks(blocks, hundredths / 100)
    assert admitted == ceil(Fraction(blocks * hundredths, 100))
    assert 0 <= admitted <= blocks
    assert admitted_blocks(blocks, 1.0) == blocks


@given(blocks=st.integers(0, 1000), ratio=st.floats(0, 1, exclude_min=True))
def test_a_longer_request_never_takes_admitted_blocks_back(blocks: int, ratio: float) -> None:
    assert admitted_blocks(blocks, ratio) <= admitted_blocks(blocks + 1, ratio)
