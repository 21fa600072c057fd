"""Fixtures of the tier suites: stores that are closed, and the directory they may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_connectors.tiers.base import TierStore
from dynamo_connectors.tiers.index import TierIndex
from tests.tiers.factories import FACTORIES, KEPT_FILES
from tests.tiers.s3_servers import CREDENTIALS
from tests.tiers.tier import Tier

MakeStore = Callable[[int, int], TierStore]


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an object store asks the environment for."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=FACTORIES)
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Makes stores of (capacity_blocks, row_bytes) of every kind, and closes them."""
    made: list[TierStore] = []

    def make(capacity_blocks: int, row_bytes: int) -> TierStore:
        made.append(FACTORIES[request.param](tmp_path, capacity_blocks, row_bytes))
        return made[-1]

    yield make
    for store in made:
        store.close()
    kept = {path.suffix for path in tmp_path.iterdir()}
    assert kept <= KEPT_FILES.get(request.param, set()), "a closed store left files"


@pytest.fixture
def make_tier(make_store: MakeStore) -> Callable[[int, int], Tier]:
    def make(capacity_blocks: int, row_bytes: int) -> Tier:
        return Tier("tier", TierIndex(capacity_blocks), make_store(capacity_blocks, row_bytes))

    return make
