"""The other ways in, each on a real engine: YAML with two API servers, the native spelling, Python's `LLM`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.client import VllmClient, prompt
from tools.vllm_server import VllmOptions, vllm_server

pytestmark = pytest.mark.engine

OFFLINE_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    prompts = json.loads(sys.argv[2])
    extra = {"kvbm_host_dram_gb": 0.05}
    settings = {"kv_connector": "dynamo", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    llm = LLM(sys.argv[1], kv_transfer_config=settings, block_size=32, max_model_len=2048, enforce_eager=True,
              dtype="bfloat16", num_gpu_blocks_override=70, max_num_batched_tokens=128, disable_log_stats=False)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    rounds = [
        [list(llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)[0].outputs[0].token_ids)
         for tokens in prompts]
        for _ in range(2)
    ]
    hits = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:external_prefix_cache_hits")
    print("RESULT " + json.dumps({"equal": rounds[0] == rounds[1], "hit_tokens": hits}))

if __name__ == "__main__":
    main()
"""


def test_yaml_native_spelling_and_two_api_servers(tiny_model: Path, logs: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    transfer = {"kv_connector": "dynamo", "kv_role": "kv_both"}
    config.write_text(f"api-server-count: 2\nkv-transfer-config: '{json.dumps(transfer)}'\nkvbm-host-dram-gb: 0.05\n")
    server = vllm_server("vllm-yaml", tiny_model, logs / "yaml.log", VllmOptions(extra=["--config", str(config)]))
    try:
        server.start().wait_ready()
        client = VllmClient(server.url)
        cold = [client.complete(prompt(seed)) for seed in range(8)]
        assert [client.complete(prompt(seed)) for seed in range(8)] == cold
        assert client.metric("dynamo_kvbm_hit_blocks_total", tier="host_dram") == 8 * 28
        # One series on the shared page, not one per API server: their sum could exceed 100 percent.
        (used,) = client.series("dynamo_kvbm_memory_utilization_percent")
        assert 0 < used.value <= 100
    finally:
        server.stop()


@pytest.mark.timeout(600)
def test_a_mistake_ends_a_real_start_with_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """Before anything is loaded; which mistakes there are, `test_launch_flags` has."""
    missing = tmp_path / "not-mounted" / "kv"
    disk = ["--kvbm-storage-tiers", "hbm,host_dram,nvme_ssd", "--kvbm-nvme-path", str(missing), "--kvbm-nvme-gb", "1"]
    vllm = Path(sys.executable).parent / "vllm"
    command = [str(vllm), "serve", str(tiny_model), "--kv-connector", "dynamo", *disk]
    run = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr + run.stdout
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"vllm: error: --kvbm-nvme-path {missing} does not exist; mount its disk, or mkdir -p")
    assert list(tmp_path.iterdir()) == []


def test_python_api(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE_SCRIPT)
    prompts = json.dumps([prompt(seed) for seed in range(4)])
    run = subprocess.run(
        [sys.executable, str(script), str(tiny_model), prompts],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")] or [run.stderr[-2000:]]
    result = json.loads(line.removeprefix("RESULT "))
    assert result == {"equal": True, "hit_tokens": 4 * 28 * 32}
