"""What SGLang's settings, weights and page hashes say about whose KV a page holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dynamo_connectors.sglang import compat


def facts(monkeypatch: pytest.MonkeyPatch, model: Path | str, **changes: object) -> dict[str, str]:
    given = {"model_path": str(model), "revision": None, "load_format": "auto", "random_seed": 1, "dtype": "auto"}
    monkeypatch.setattr(compat, "server_args", lambda: SimpleNamespace(**given, **changes))
    return compat.engine_facts()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_the_same_model_has_the_same_facts(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    assert facts(monkeypatch, model) == facts(monkeypatch, model)


@pytest.mark.parametrize(
    "change",
    [
        {"kv_cache_dtype": "fp8_e5m2"},
        {"quantization": "fp8"},
        {"json_model_override_args": '{"rope_theta": 1}'},
        {"speculative_algorithm": "EAGLE"},
    ],
)
def test_a_setting_that_changes_kv_changes_the_facts(
    monkeypatch: pytest.MonkeyPatch, model: Path, change: dict[str, object]
) -> None:
    assert facts(monkeypatch, model, **change) != facts(monkeypatch, model)


def test_other_weights_in_the_same_place_are_another_model(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    before = facts(monkeypatch, model)
    (model / "model.safetensors").write_bytes(b"weights, finetuned")
    assert facts(monkeypatch, model) != before


@pytest.mark.parametrize("given_as", ["tutor={}", "{}", SimpleNamespace(lora_path="{}")], ids=repr)
def test_an_adapter_trained_anew_in_its_place_is_another_adapter(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path, given_as: object
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"first")
    text = str(getattr(given_as, "lora_path", given_as)).format(adapter)
    launch = {"lora_paths": [SimpleNamespace(lora_path=text) if isinstance(given_as, SimpleNamespace) else text]}
    before = facts(monkeypatch, model, **launch)
    assert facts(monkeypatch, model, **launch) == before
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    assert facts(monkeypatch, model, **launch) != before


def test_another_draft_model_in_its_place_is_another_model(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    draft = model / "draft"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"first")
    before = facts(monkeypatch, model, speculative_draft_model_path=str(draft))
    (draft / "model.safetensors").write_bytes(b"other")
    assert facts(monkeypatch, model, speculative_draft_model_path=str(draft)) != before


def test_another_version_of_the_engine_reads_nothing_of_this_one(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    before = facts(monkeypatch, model)
    monkeypatch.setattr(compat, "engine_version", lambda: "0.6")
    assert facts(monkeypatch, model) != before


def test_weights_that_cannot_be_seen_are_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("s3://bucket/model", "nobody/has-downloaded-this"):
        assert facts(monkeypatch, place)["weights"] != facts(monkeypatch, place)["weights"]


def test_a_tenant_or_adapter_gets_hashes_of_its_own() -> None:
    """Of SGLang before 0.5.23, whose page hash knows tokens only."""

    def parent(extra_key: str | None, prior: str | None = None) -> str | None:
        (_, start, end, seeded), _ = compat.seed_page_hash(SimpleNamespace(extra_key=extra_key), 0, 16, prior)
        assert (start, end) == (0, 16)
        assert seeded is None or isinstance(seeded, str)
        return seeded

    assert parent(None) is None
    assert len({parent("a"), parent("b"), parent("")}) == 3
    assert bytes.fromhex(parent("a") or "")
    assert parent("a", prior="00") == "00", "pages behind the first one hang on it"
