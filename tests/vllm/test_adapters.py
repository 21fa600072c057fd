"""An adapter that is trained anew in its place is another one, for every process that loads it after that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from dynamo_connectors.block_manager import Change
from dynamo_connectors.vllm.adapters import Adapters, place_of
from dynamo_connectors.vllm.groups import Chains, Geometry, Group
from dynamo_connectors.vllm.kv_events import TierEvents
from tests.vllm.fakes import BLOCK, keep, make, request
from tests.vllm.requests import real_request


def using(adapter: Path | str, number: int = 1) -> SimpleNamespace:
    return SimpleNamespace(lora_request=SimpleNamespace(lora_int_id=number, lora_path=str(adapter)))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"first")
    return tmp_path


def test_a_process_keeps_the_name_of_what_it_has_loaded(adapter: Path) -> None:
    adapters, next_process = Adapters(), Adapters()
    name = adapters.name_of(using(adapter))
    assert name == next_process.name_of(using(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    assert adapters.name_of(using(adapter)) == name, "what is loaded has not changed"
    assert adapters.name_of(using(adapter, number=2)) != name
    assert Adapters().name_of(using(adapter)) != name
    assert adapters.name_of(SimpleNamespace(lora_request=None)) == b""
    adapters.check()


def test_an_adapter_that_cannot_be_seen_is_nobody_elses() -> None:
    for place in ("s3://bucket/adapter", "nobody/has-downloaded-this"):
        assert place_of(place) is None
        adapters = Adapters()
        assert adapters.name_of(using(place)) == adapters.name_of(using(place))
        assert adapters.name_of(using(place)) != Adapters().name_of(using(place))


def test_a_prompt_finds_what_its_own_adapter_computed(adapter: Path) -> None:
    half, _ = make()
    keep(half, "a", [1, 2, 3, 4])
    mine = request("b", 4, "a")
    mine.lora_request = using(adapter).lora_request
    assert half.matched_tokens(mine, 0) == 0
    assert half.matched_tokens(request("c", 4, "a"), 0) == 4 * BLOCK


def test_routers_hear_the_engines_hashes() -> None:
    geometry, who = Geometry((Group(BLOCK),), BLOCK), real_request(lora="style")
    events = TierEvents(geometry, enabled=True)
    key = Chains(geometry, who.block_hashes, b"12345678").keys(0)[0]
    events.describe(who, 0, 0, [key])
    events.publish([Change("stored", "host_dram", key), Change("removed", "host_dram", key)])
    plain = TierEvents(geometry, enabled=True)
    plain.describe(who, 0, 0, who.block_hashes[:1])
    plain.publish([Change("stored", "host_dram", who.block_hashes[0])])
    (engine_hash,) = [event.block_hashes for event in plain.take()]
    assert [event.block_hashes for event in events.take()] == [engine_hash] * 2
