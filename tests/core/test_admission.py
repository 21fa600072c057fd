"""How much of a request may leave HBM."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.admission import TouchSketch, admitted_blocks
from dynamo_connectors.blocks import BlockKey


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


def key_of(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


@given(uses=st.lists(st.integers(0, 30), max_size=200))
def test_the_sketch_counts_a_young_stream_never_too_low(uses: list[int]) -> None:
    sketch = TouchSketch(1000)
    for number in uses:
        sketch.use(key_of(number))
    for number, count in Counter(uses).items():
        assert sketch.uses(key_of(number)) >= count


def test_the_sketch_is_seldom_too_high() -> None:
    sketch = TouchSketch(10_000)
    for number in range(10_000):
        sketch.use(key_of(number))
    too_high = sum(sketch.uses(key_of(number)) > 0 for number in range(10_000, 20_000))
    # Two rows of 65,536 counters, 10,000 of them in use at most: 2.3 % by chance, and the hash is another each time.
    assert too_high < 600


def test_the_sketch_halves_its_counts_after_as_many_uses_as_a_row_has_counters() -> None:
    sketch = TouchSketch(16)
    for _ in range(63):
        sketch.use(key_of(1))
    assert sketch.uses(key_of(1)) == 63
    sketch.use(key_of(1))
    assert sketch.uses(key_of(1)) == 32
    for _ in range(64 * 8):
        sketch.use(key_of(2))
    assert sketch.uses(key_of(1)) in (0, sketch.uses(key_of(2))), "what was used long ago is not forgotten"


def test_a_count_ends_at_255() -> None:
    sketch = TouchSketch(1000)
    for _ in range(300):
        sketch.use(key_of(1))
    assert sketch.uses(key_of(1)) == 255


def test_the_sketch_takes_eight_bytes_for_each_block() -> None:
    sketch = TouchSketch(1 << 20)
    assert sum(map(len, sketch._rows)) == 8 << 20
