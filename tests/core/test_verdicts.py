"""What reasons say about bytes."""

from __future__ import annotations

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.verdicts import damaged


def test_a_fault_of_ours_condemns_no_bytes() -> None:
    failed = {BlockKey(b"a"): "internal_error", BlockKey(b"b"): "bad_checksum", BlockKey(b"c"): "timeout"}
    assert damaged(failed) == {BlockKey(b"b")}
