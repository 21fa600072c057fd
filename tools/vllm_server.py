"""How the demo and the tests launch a real vLLM for CPU on the tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.server_process import ServerProcess, free_port

MODEL_NAME = "tiny"
BLOCK_TOKENS = 32
#: Prefill runs in chunks of this many tokens. A prompt that ends at most one block behind a multiple of it computes its
#: last chunk in the same shape cold and on a hit, so the answers can be compared bit for bit.
CHUNK_TOKENS = 128


@dataclass(frozen=True)
class VllmOptions:
    hbm_blocks: int = 160
    max_model_tokens: int = 4096
    events_port: int | None = None
    extra: Sequence[str] = ()


def vllm_server(name: str, model: Path, log: Path, options: VllmOptions, port: int | None = None) -> ServerProcess:
    """A server that is not started yet."""
    port = port or free_port()
    vllm = Path(sys.executable).parent / "vllm"
    command = [
        str(vllm), "serve", str(model),
        "--host", "127.0.0.1",
        "--port", str(port),
        "--served-model-name", MODEL_NAME,
        "--dtype", "bfloat16",
        "--block-size", str(BLOCK_TOKENS),
        "--max-model-len", str(options.max_model_tokens),
        "--max-num-batched-tokens", str(CHUNK_TOKENS),
        "--num-gpu-blocks-override", str(options.hbm_blocks),
        "--enforce-eager",
    ]  # fmt: skip
    if options.events_port is not None:
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{options.events_port}",
            "replay_endpoint": f"tcp://*:{free_port()}",
        }
        command += ["--kv-events-config", json.dumps(events)]
    command += options.extra
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return ServerProcess(name, command, f"http://127.0.0.1:{port}", log, env)
