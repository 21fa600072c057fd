"""Hints come from clients: every value must be harmless, and other connectors' keys must stay theirs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.vllm.hints import Hints, parse_hints


def test_hints_are_read_beside_the_keys_of_other_connectors() -> None:
    params = {"do_remote_decode": True, "kvbm_pin_ttl_seconds": 30, "kvbm_no_store": True, "kvbm_prefetch": True}
    assert parse_hints(params) == (Hints(30.0, True, True), [])
    assert parse_hints({"do_remote_prefill": True}) == (Hints(), [])
    assert parse_hints(None) == (Hints(), [])


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"kvbm_pin_ttl_seconds": -1}, "from 0 to 86400"),
        ({"kvbm_pin_ttl_seconds": "30"}, "from 0 to 86400"),
        ({"kvbm_pin_ttl_seconds": True}, "from 0 to 86400"),
        ({"kvbm_pin_ttl_seconds": math.nan}, "from 0 to 86400"),
        ({"kvbm_pin_ttl_seconds": 1e9}, "from 0 to 86400"),
        ({"kvbm_no_store": "yes"}, "true or false"),
        ({"kvbm_prefetch": 1}, "true or false"),
        ({"kvbm_pin": 1}, "unknown hint kvbm_pin"),
    ],
)
def test_a_hint_that_makes_no_sense_is_ignored_and_told_in_one_line(params: dict[str, Any], word: str) -> None:
    hints, (problem,) = parse_hints({**params, "other": 1})
    assert hints == Hints()
    assert word in problem
    assert "\n" not in problem


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
NAMES = st.sampled_from(["kvbm_pin_ttl_seconds", "kvbm_no_store", "kvbm_prefetch", "kvbm_x"]) | st.text()


@given(JSON | st.dictionaries(NAMES, JSON))
def test_nothing_a_client_sends_raises(params: Any) -> None:
    hints, _ = parse_hints(params)
    assert 0 <= hints.pin_ttl_seconds <= 86_400
