"""What the operator hears of blocks that were not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from dynamo_connectors.errors import StoreError
from dynamo_connectors.loads import reasons


def test_only_what_is_to_be_looked_into_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def said(*why: str) -> list[str]:
        caplog.clear()
        done: Future[Sequence[StoreError | None]] = Future()
        done.set_result([None, *(StoreError(reason, "the block did not come") for reason in why)])
        assert reasons(done, 1 + len(why)) == [None, *why]
        return [record.getMessage() for record in caplog.records]

    assert not said()
    assert not said("gone", "tier_off")
    assert not said("refused", "refused"), "its peer was complained of when it was refused"
    (line,) = said("gone", "bad_checksum", "stale")
    assert "3 blocks were not transferred, the first one: bad_checksum" in line
