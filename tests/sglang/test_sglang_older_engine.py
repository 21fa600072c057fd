"""The oldest SGLang that we support, booted for real: the same scenario as on the newest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sglang.asking import answer_from_storage, flood
from tests.sglang.server import Server, make_server, prompts

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def older_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sglang_0514")
    running = make_server(tiny_model, folder, "--disable-overlap-schedule", name="sglang-0.5.14")
    try:
        running.process.start().wait_ready()
        yield running
    finally:
        running.process.stop()


def test_cold_host_and_disk_answer_alike(older_server: Server) -> None:
    server = older_server
    first, second = prompts(seed=1, count=2)
    cold = server.generate(first)
    assert cold.cached_tokens == 0
    flood(server, seed=2, count=1)
    from_host = server.generate(first)
    assert from_host.output == cold.output
    assert from_host.host_tokens > 0
    assert answer_from_storage(server, first, cold.output).storage_tokens >= 256
    assert server.metric("dynamo_kvbm_hit_blocks_total", 'tier="nvme_ssd"') >= 16
    # A tenant of its own: its pages have other hashes, though this SGLang's page hash leaves the tenant out.
    salted = server.generate(second, extra_key="another tenant")
    flood(server, seed=3)
    plain = server.generate(second)
    assert plain.output == salted.output
    assert plain.storage_tokens == 0
