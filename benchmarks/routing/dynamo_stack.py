"""NVIDIA Dynamo's frontend before its own mocker engines: it serves no others, so they stand in the C engine's place.

FOLDER/dynamo is an environment with ai-dynamo and ai-dynamo-runtime (file discovery, TCP, ZMQ: no etcd, no NATS).
"""

from __future__ import annotations

import os
from pathlib import Path

from tools.tiny_model import make_model

_PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
_AT_ONCE = ["--speedup-ratio", "1000000", "--num-gpu-blocks-override", "65536", "--block-size", "16"]


def commands(peers: Path | None, port: int, engines: int, folder: Path) -> tuple[list[str], list[str]] | None:
    """(engines, frontend), or None if Dynamo is not installed. `folder` must be `environment`'s."""
    if peers is None or not (program := peers / "dynamo" / "bin" / "python").exists():
        return None
    model = ["--model-path", str(make_model(folder / "model")), "--model-name", "m"]
    mocker = [str(program), "-m", "dynamo.mocker", *model, "--num-workers", str(engines), *_AT_ONCE, *_PLANES]
    kv = ["--router-mode", "kv", "--tokenizer", "fastokens"]
    return mocker, [str(program), "-m", "dynamo.frontend", "--http-port", str(port), *kv, *_PLANES]


def environment(folder: Path) -> dict[str, str]:
    """Where frontend and engines find each other."""
    return {**os.environ, "DYN_FILE_KV": str(folder / "dynamo-discovery"), "DYN_LOG": "error"}
