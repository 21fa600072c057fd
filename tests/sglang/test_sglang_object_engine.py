"""The object store below a real SGLang's disk: what one server kept, the next one finds there with an empty disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from soak.object_store import BUCKET, SECRETS, make_bucket, s3_server
from tests.sglang.asking import wait_until
from tests.sglang.server import Answer, Server, make_server, prompts
from tools.server_process import ServerProcess
from tools.sglang_server import PAGE_TOKENS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

#: A prompt, and what was answered when its KV was computed.
Asked: TypeAlias = tuple[list[int], Answer]
#: Of pages this small, a chunk holds the most blocks there are.
CHUNK = 32
#: Two chunks and a rest.
TOKENS = 2 * CHUNK * PAGE_TOKENS + 76
OBJECTS = 'tier="object_store"'


@contextmanager
def started(model: Path, folder: Path, endpoint: str) -> Iterator[Server]:
    """A server with an empty disk; all of them share one bucket."""
    flags = ["--kvbm-object-url", f"s3://{BUCKET}/team", "--kvbm-object-endpoint-url", endpoint]
    flags += ["--kvbm-object-gb", "0.1", "--kvbm-object-min-touches", "1", "--max-total-tokens", "4096"]
    server = make_server(model, folder, *flags)
    server.process.env = {**server.process.env, **SECRETS}
    try:
        server.process.start().wait_ready()
        yield server
    finally:
        server.process.stop()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A process of its own: connections live as long as their clients like."""
    service = s3_server(tmp_path_factory.mktemp("s3") / "s3.log")
    try:
        service.start().wait_ready()
        make_bucket(service.url)
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="module")
def asked(tiny_model: Path, store: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    """Prompts that a first server has computed and kept, and its answers."""
    mine = prompts(seed=1, count=3, tokens=TOKENS)
    with started(tiny_model, tmp_path_factory.mktemp("first_server"), store.url) as server:
        cold = [server.generate(prompt) for prompt in mine]
        blocks = len(mine) * 2 * CHUNK
        wait_until(lambda: server.metric("dynamo_kvbm_offloaded_blocks_total", OBJECTS) >= blocks, "the store has all")
        assert server.metric("dynamo_kvbm_offloaded_bytes_total", OBJECTS) > 0
    assert [answer.cached_tokens for answer in cold] == [0] * len(mine)
    assert len({tuple(answer.output) for answer in cold}) == len(mine), "the model's answers do not tell prompts apart"
    return list(zip(mine, cold, strict=True))


@pytest.fixture(scope="module")
def second(
    tiny_model: Path, store: ServerProcess, asked: list[Asked], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with started(tiny_model, tmp_path_factory.mktemp("second_server"), store.url) as server:
        blocks = len(asked) * 2 * CHUNK
        wait_until(
            lambda: server.metric("dynamo_kvbm_recovered_blocks_total", OBJECTS) >= blocks, "it knows the objects"
        )
        yield server


def test_answers_from_the_object_store_equal_cold_ones(second: Server, asked: list[Asked]) -> None:
    prompt, cold = asked[0]
    warm = second.generate(prompt)
    assert warm.output == cold.output
    assert warm.storage_tokens == 2 * CHUNK * PAGE_TOKENS
    assert second.metric("dynamo_kvbm_hit_blocks_total", OBJECTS) == 2 * CHUNK
    assert second.metric("dynamo_kvbm_hit_blocks_total", 'tier="nvme_ssd"') == 0
    assert second.metric("dynamo_kvbm_onboarded_bytes_total", OBJECTS) > 0


def test_what_lies_behind_pages_that_sglang_holds_is_found(second: Server, asked: list[Asked]) -> None:
    prompt, cold = asked[1]
    held = CHUNK + 5
    second.generate(prompt[: held * PAGE_TOKENS])
    warm = second.generate(prompt)
    assert warm.output == cold.output
    assert warm.storage_tokens == (CHUNK - 5) * PAGE_TOKENS
    assert second.metric("dynamo_kvbm_load_failures_total") == 0


def test_a_store_that_hangs_delays_nobody_beyond_its_deadline(
    second: Server, asked: list[Asked], store: ServerProcess
) -> None:
    """Everything is answered while it hangs; a request that waited for it would never be."""
    prompt, cold = asked[2]
    assert store.process is not None
    # It takes connections and says nothing.
    store.stand_still()
    try:
        answer = second.generate(prompt)
        assert answer.output == cold.output
        assert answer.storage_tokens == 0
        assert second.metric("dynamo_kvbm_load_failures_total") > 0
        assert second.metric("dynamo_kvbm_object_failures_total") > 0
        for known, first in asked[:2]:
            assert second.generate(known).output == first.output
        for fresh in prompts(seed=2, count=3, tokens=TOKENS):
            second.generate(fresh)
    finally:
        store.go_on()
