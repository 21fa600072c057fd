"""`dynamo-planner profile` on a real vLLM: what it writes is what the planner reads, and its plots are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from dynamo_planner.cli import main
from dynamo_planner.profile_file import models, read_profile, with_profile
from dynamo_planner.records import Memory
from dynamo_planner.step_model import coefficients, predict

from tools.server_process import ServerProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]


def test_a_real_engine_is_measured(engine: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    asked = ["--prompt-tokens", "32,256,896,100000", "--batches", "1,4", "--output-tokens", "96"]
    assert main(["profile", "--engine", engine.url, "--out", str(out), *asked]) == 0
    profile = read_profile(out)
    assert [tokens for tokens, _ in profile.prefill] == [32, 256, 896], "the engine refuses 100,000 tokens"
    assert [batch for batch, *_ in profile.decode] == [1, 4]
    assert all(0 < kv < 1 for _, kv, _ in profile.decode), "KV use is read off the engine while it runs"
    prefill, decode = (coefficients(model) for model in models(profile))
    assert prefill is not None
    assert decode is not None
    assert predict(prefill, (1.0, 896.0)) > 0 < predict(decode, (1.0, 4.0, 0.1))
    assert with_profile(Memory(), out).prefill.points, "a planner begins with it"
    assert out.with_suffix(".html").read_text().count("<svg") == 2
    assert f"written: {out}" in capsys.readouterr().out
