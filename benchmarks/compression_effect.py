"""What compressed KV does to answers: a real vLLM for CPU, every prompt computed, evicted and loaded back.

python -m benchmarks compression_effect [--prompts 24] [--weights 0.2,0.05] [--out FILE]
One engine for each width of the random weights and each of off, fp8, int8. Not a measure of speed: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from tools.server_process import ServerProcess
from tools.tiny_model import make_model
from tools.vllm_server import CHUNK_TOKENS, MODEL_NAME, VllmOptions, vllm_server

KINDS = ("off", "fp8", "int8")
_TOP = 10


class Answer(NamedTuple):
    """The first token, and the logprobs of the likeliest ones by token."""

    token: str
    logprobs: dict[str, float]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="compression_effect", description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--weights", default="0.2,0.05", help="widths of the model's random weights")
    parser.add_argument("--out", type=Path, help="raw figures as JSON lines")
    options = parser.parse_args(arguments)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for width in map(float, options.weights.split(",")):
            model = make_model(Path(name) / f"model-{width}", width=width)
            for kind in KINDS:
                lines.append({"weights": width, "kind": kind, **measure(kind, model, Path(name), options.prompts)})
                print(text(lines[-1]), flush=True)
    if options.out is not None:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


def measure(kind: str, model: Path, folder: Path, prompts: int) -> dict[str, Any]:
    """Room for every prompt in host memory and for six of them in HBM."""
    extra = ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.1", "--kvbm-load-gate", "off"]
    server = vllm_server(f"vllm-{kind}", model, folder / f"{kind}.log", VllmOptions(extra=[*extra, *_flags(kind)]))
    try:
        server.start().wait_ready(900)
        cold = [ask(server, seed) for seed in range(prompts)]
        warm = [ask(server, seed) for seed in range(prompts)]
        hits = _hits(server)
    finally:
        server.stop()
    distances = [
        abs(warm_[token] - cold_[token]) for cold_, warm_ in _pairs(cold, warm) for token in cold_ if token in warm_
    ]
    return {
        "prompts": prompts,
        "hit_blocks": hits,
        "same_first_token": sum(one.token == other.token for one, other in zip(cold, warm, strict=True)),
        "logprob_mean": statistics.fmean(distances),
        "logprob_p99": sorted(distances)[int(len(distances) * 0.99)],
        "logprob_max": max(distances),
        "kept_in_top": len(distances) / (_TOP * prompts),
    }


def _flags(kind: str) -> list[str]:
    return [] if kind == "off" else ["--kvbm-compression", kind]


def _pairs(cold: list[Answer], warm: list[Answer]) -> list[tuple[dict[str, float], dict[str, float]]]:
    return [(one.logprobs, other.logprobs) for one, other in zip(cold, warm, strict=True)]


def ask(server: ServerProcess, seed: int) -> Answer:
    import random

    rng = random.Random(seed)
    body = {
        "model": MODEL_NAME,
        # The last chunk has the same shape cold and after a hit.
        "prompt": [rng.randrange(10, 500) for _ in range(7 * CHUNK_TOKENS + 4)],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": _TOP,
        "return_tokens_as_token_ids": True,
    }
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        found = json.loads(reply.read())["choices"][0]["logprobs"]
    return Answer(found["tokens"][0], dict(found["top_logprobs"][0]))


def _hits(server: ServerProcess) -> float:
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as reply:
        page = reply.read().decode()
    values = [line.split()[-1] for line in page.splitlines() if line.startswith("dynamo_kvbm_hit_blocks_total")]
    return sum(map(float, values))


def text(line: dict[str, Any]) -> str:
    return (
        f"weights {line['weights']:<5g} {line['kind']:<5} first token equal {line['same_first_token']:>3} of "
        f"{line['prompts']}; logprobs of the likeliest {_TOP}: mean {line['logprob_mean']:.4f}, "
        f"99th {line['logprob_p99']:.4f}, max {line['logprob_max']:.4f} apart; {line['hit_blocks']:.0f} blocks hit"
    )
