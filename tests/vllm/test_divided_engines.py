"""Two real vLLM, one on a single rank and one on two, hand their prompts over both ways. One is killed in the end, and
another model comes at its address.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm")

from tests.vllm.client import Answer, VllmClient, prompt, wait_until
from tests.vllm.pair import BLOCKS, PREFILL
from tools.server_process import ServerProcess, free_port
from tools.tiny_model import make_model
from tools.vllm_server import MODEL_NAME, VllmOptions, vllm_server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

#: All of the tiny model's KV, of one block: 2 heads of 64 in 4 layers, keys and values.
BLOCK_BYTES = 32 * 4 * 2 * 64 * 2 * 4


class Engine(NamedTuple):
    server: ServerProcess
    client: VllmClient

    @classmethod
    def of(cls, name: str, model: Path, logs: Path, ranks: int) -> Engine:
        tiers = ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.03", "--kvbm-load-gate", "off"]
        peers = ["--kvbm-role", "both", "--kvbm-peer-port", str(free_port(ranks)), "--kvbm-peer-deadline-ms", "30000"]
        # Sums over ranks round differently, which in 16 bits decides some of the tokens.
        numbers = ["--dtype", "float32", "--tensor-parallel-size", str(ranks)]
        server = vllm_server(name, model, logs / f"{name}.log", VllmOptions(extra=[*tiers, *peers, *numbers]))
        more = {"UCX_LOG_LEVEL": "error", "UCX_TLS": "tcp", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        server.env = {**server.env, **more}
        return cls(server, VllmClient(server.url))

    def ticket(self, tokens: list[int]) -> dict[str, Any]:
        body = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 1, "kv_transfer_params": PREFILL}
        params: dict[str, Any] = self.client.post("/v1/completions", body)["kv_transfer_params"]
        return params

    @property
    def from_peers(self) -> float:
        return self.client.metric("dynamo_kvbm_hit_blocks_total", tier="peer")


class Engines(NamedTuple):
    one: Engine
    two: Engine


@pytest.fixture(scope="module")
def engines(tiny_model: Path, logs: Path) -> Iterator[Engines]:
    engines = Engines(*(Engine.of(f"ranks-{ranks}", tiny_model, logs, ranks) for ranks in (1, 2)))
    with ExitStack() as stack:
        for server, _ in engines:
            stack.callback(server.stop)
            server.start()
        for server, _ in engines:
            server.wait_ready(600.0)
        yield engines


def same(answer: Answer, alone: Answer) -> bool:
    return answer.tokens == alone.tokens and answer.logprobs == pytest.approx(alone.logprobs, abs=0.01)


@pytest.mark.parametrize("ranks", [1, 2])
def test_answers_equal_those_of_one_engine_and_every_block_comes(engines: Engines, ranks: int) -> None:
    """From so many ranks to the other engine."""
    prefill, decode = engines if ranks == 1 else reversed(engines)
    seeds = iter(range(1000 * ranks, 1000 * ranks + 1000))
    read_before = decode.client.metric("dynamo_nixl_read_bytes_total")

    def comes() -> bool:
        """Eventually, however slow the machine; and always with the same answer."""
        tokens, before = prompt(next(seeds)), decode.from_peers
        alone = prefill.client.complete(tokens)
        assert same(decode.client.complete(tokens, kv_transfer_params=prefill.ticket(tokens)), alone)
        return decode.from_peers == before + BLOCKS

    for _ in range(2):
        wait_until(comes, "a prompt comes over", 120.0)
    assert decode.client.metric("dynamo_nixl_read_bytes_total") - read_before >= 2 * BLOCKS * BLOCK_BYTES
    assert decode.client.metric("dynamo_nixl_window_blocks_total") == 0

    def has_ended() -> bool:
        prefill.client.complete(prompt(next(seeds), chunks=1), max_tokens=1)  # gauges are published by steps
        return prefill.client.metric("dynamo_nixl_open_leases") == 0

    wait_until(has_ended, "both sides are done with every lease", 120.0)
    assert prefill.client.metric("dynamo_nixl_leases_ended_total", reason="done") >= 2


def test_an_engine_that_is_killed_and_one_of_another_model_cost_no_answer(
    engines: Engines, tmp_path: Path, logs: Path
) -> None:
    one, two = engines
    tokens, failed = prompt(7), two.client.metric("dynamo_kvbm_load_failures_total")
    alone, ticket = one.client.complete(tokens), one.ticket(tokens)
    one.server.kill()
    assert same(two.client.complete(tokens, kv_transfer_params=ticket), alone)
    assert two.client.metric("dynamo_kvbm_load_failures_total") > failed
    other = Engine.of("ranks-1-other", make_model(tmp_path / "other", width=0.25), logs, 1)
    try:
        other.server.start().wait_ready(600.0)
        tokens, before = prompt(8), two.from_peers
        handed = two.client.complete(tokens, kv_transfer_params=other.ticket(tokens))
        assert two.from_peers == before

        def is_refused() -> bool:
            two.client.complete(prompt(9, chunks=1), max_tokens=1)  # counts are published by steps
            return two.client.metric("dynamo_nixl_refused_peers_total", reason="other_model") >= 2

        wait_until(is_refused, "each rank has been refused", 60.0)
    finally:
        other.server.stop()
    two.client.empty_hbm()
    assert same(two.client.complete(tokens), handed)
    said = two.server.log.read_text()
    lines = {line.partition("cannot be read: ")[2] for line in said.splitlines() if "cannot be read" in line}
    assert len(lines) == 1
    assert "do not compute the same KV" in lines.pop()
    assert "first one: refused" not in said, "nothing more is said of its blocks"
    assert "Traceback" not in said
