"""Clients that people have, unchanged, before the proxy."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.proxy.proxy_fakes import FakeEngine, proxy_before, run

pytestmark = pytest.mark.timeout(900)

PROMPTS = 6


def test_vllm_bench_serve(tiny_model: Path, tmp_path: Path) -> None:
    async def body() -> None:
        engines = await FakeEngine().start(), await FakeEngine().start()
        async with proxy_before(*engines) as proxy:
            program = Path(sys.executable).parent / "vllm"
            where = ["--base-url", f"http://127.0.0.1:{proxy.port}", "--endpoint", "/v1/chat/completions"]
            what = ["--backend", "openai-chat", "--model", "tiny", "--tokenizer", str(tiny_model)]
            load = ["--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "4"]
            out = ["--num-prompts", str(PROMPTS), "--save-result", "--result-filename", str(tmp_path / "result.json")]
            process = await asyncio.create_subprocess_exec(
                program, "bench", "serve", *where, *what, *load, *out, "--disable-tqdm",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            said, _ = await process.communicate()
            assert process.returncode == 0, said.decode()[-2000:]
            assert all(engine.prompts for engine in engines)
        result = json.loads((tmp_path / "result.json").read_text())
        assert (result["completed"], result["failed"]) == (PROMPTS, 0)
        assert result["mean_ttft_ms"] > 0

    run(body())
