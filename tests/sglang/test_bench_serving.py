"""SGLang's own load generator, unchanged, before the proxy."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests.proxy.proxy_fakes import proxy_before, run
from tests.proxy.token_engine import TokenEngine
from tools.sglang_server import default_environment, server_variables
from tools.tiny_model import make_model

pytestmark = pytest.mark.timeout(900)

PROMPTS = 6


@pytest.mark.parametrize("backend", ["vllm", "vllm-chat"])
def test_bench_serving(tmp_path: Path, backend: str) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "result.jsonl"

    async def body() -> None:
        engines = await TokenEngine().start(), await TokenEngine().start()
        async with proxy_before(*engines) as proxy:
            where = ["--backend", backend, "--base-url", f"http://127.0.0.1:{proxy.port}"]
            what = ["--model", "tiny", "--tokenizer", str(model), "--dataset-name", "random-ids"]
            load = ["--random-input-len", "40", "--random-output-len", "4", "--random-range-ratio", "1"]
            process = await asyncio.create_subprocess_exec(
                str(default_environment() / "bin" / "python"), "-m", "sglang.bench_serving", *where, *what, *load,
                "--num-prompts", str(PROMPTS), "--output-file", str(out), "--disable-tqdm",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **server_variables(default_environment(), os.environ.get("PYTHONPATH", ""))},
            )  # fmt: skip
            said, _ = await process.communicate()
            assert process.returncode == 0, said.decode()[-3000:]
            assert all(engine.prompts for engine in engines)
        result = json.loads(out.read_text().splitlines()[-1])
        assert result["completed"] == PROMPTS
        assert result["mean_ttft_ms"] > 0

    run(body())
