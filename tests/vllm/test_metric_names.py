"""Every count has a metric: one that has none would end vLLM's API server the first time that it is told."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("vllm")

from dynamo_connectors.vllm.metrics import _COUNTERS
from tests.house.repository import ROOT

#: `counts["what", label] += 1`, `_refused["what", label]`, `_count("what", label)`.
COUNTED = re.compile(r"""(?:counts\[|_refused\[|_count\()"(\w+)",""")


def test_every_count_has_a_metric() -> None:
    counted: set[str] = set()
    for folder in ("transport", "vllm"):
        for path in (ROOT / "dynamo_connectors" / folder).glob("*.py"):
            counted |= set(COUNTED.findall(path.read_text()))
    assert {"nixl_silent_peers", "nixl_refused_messages", "hit_blocks", "load_failures"} <= counted
    assert counted <= _COUNTERS.keys(), counted - _COUNTERS.keys()
