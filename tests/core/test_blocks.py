"""Two configurations that could misread each other's bytes never share a namespace."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.blocks import NAMESPACE_DIGEST_BYTES, Namespace

BASE = Namespace(
    engine="vllm",
    model="m",
    revision="r",
    dtype="bfloat16",
    layout_fingerprint="f",
    block_size_tokens=16,
)
TEXTS = ["engine", "model", "revision", "dtype", "layout_fingerprint", "key_rules", "weights"]
hostile = st.text(alphabet='a",[]\\:;|\0 ', max_size=6)


@pytest.mark.parametrize("name", [field.name for field in fields(Namespace)])
def test_every_field_decides(name: str) -> None:
    value = getattr(BASE, name)
    other = replace(BASE, **{name: value + (1 if isinstance(value, int) else "x")})
    assert other.digest != BASE.digest


def test_the_digest_is_the_same_in_every_process() -> None:
    assert BASE.digest == replace(BASE).digest
    assert len(BASE.digest) == NAMESPACE_DIGEST_BYTES
    assert BASE.digest.hex() == "6f8cc7a1dd814d6d96331231b13e4f56"


@given(left=st.lists(hostile, min_size=7, max_size=7), right=st.lists(hostile, min_size=7, max_size=7))
def test_no_field_can_imitate_two(left: list[str], right: list[str]) -> None:
    one = replace(BASE, **dict(zip(TEXTS, left, strict=True)))
    two = replace(BASE, **dict(zip(TEXTS, right, strict=True)))
    assert (one.digest == two.digest) == (one == two)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"model": "ab", "revision": "c"}, {"model": "a", "revision": "bc"}),
        ({"model": 'a","r', "revision": "b"}, {"model": "a", "revision": 'r","b'}),
        ({"tp_rank": 1, "tp_size": 12}, {"tp_rank": 11, "tp_size": 2}),
        ({"key_rules": "1"}, {"key_rules": "1\0"}),
        ({"model": "é"}, {"model": "e\u0301"}),
    ],
)
def test_pieces_that_join_to_the_same_text_differ(one: dict[str, str], two: dict[str, str]) -> None:
    assert replace(BASE, **one).digest != replace(BASE, **two).digest
