"""Models whose KV is not a Llama's on a real SGLang: latent and the same on two ranks (MLA), or in two pools (windows).

The adapter meets SGLang's own pools here: its second interface (`batch_*_v2`), and the rank that writes for all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sglang.asking import answer_from_storage, flood
from tests.sglang.server import Server, make_server, prompts
from tests.sglang.test_sglang_engine import corrupt_every_slot
from tests.sglang.tiny_model import write_latent_model, write_window_model

# Booting takes 35 s on a quiet machine of 2 cores and minutes on a busy one.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@contextmanager
def serving(model: Path, folder: Path, *more: str) -> Iterator[Server]:
    server = make_server(model, folder, *more)
    cpus = sorted(os.sched_getaffinity(0))
    # What SGLang's attention for CPUs lacks (tools/sglang_stand_ins), and more ranks than it wants on a NUMA node.
    more_environment = {"DYNAMO_TEST_ATTENTION": "1", "SGLANG_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}"}
    environment = {**server.process.env, **more_environment}
    server = replace(server, process=replace(server.process, env=environment))
    try:
        server.process.start().wait_ready(600)
        yield server
        server.process.stop()
        assert "Scheduler hit an exception" not in server.log()
    finally:
        server.process.stop()


def cold_and_from_the_disk(server: Server) -> tuple[list[int], list[int]]:
    """A prompt and its answer, the same in both ways."""
    mine = prompts(seed=1, count=2)
    cold = [server.generate(prompt) for prompt in mine]
    assert [answer.cached_tokens for answer in cold] == [0, 0]
    assert cold[0].output != cold[1].output, "the model's answers do not tell prompts apart"
    for prompt, first in zip(mine, cold, strict=True):
        assert answer_from_storage(server, prompt, first.output).storage_tokens >= 256
    assert server.metric("dynamo_kvbm_load_failures_total") == 0
    return mine[0], cold[0].output


def damaged_is_computed(server: Server, prompt: list[int], expected: list[int], slab: Path) -> None:
    flood(server, seed=41)
    corrupt_every_slot(slab)
    again = server.generate(prompt)
    assert (again.output, again.storage_tokens) == (expected, 0)
    answer_from_storage(server, prompt, expected)


def test_latent_kv_is_written_by_one_rank_and_read_by_both(tmp_path: Path) -> None:
    model = write_latent_model(tmp_path / "model")
    with serving(model, tmp_path, "--tp-size", "2") as server:
        prompt, expected = cold_and_from_the_disk(server)
        damaged_is_computed(server, prompt, expected, server.slab())
    assert "is read from the slabs that rank 0 writes" in server.log()
    assert server.log().count("nvme_ssd tier /") == 1, "the other rank has a slab of its own"


def test_a_window_has_pages_of_its_own(tmp_path: Path) -> None:
    """A prefix comes back only with what the window's layers held of its end, in a second slab."""
    model = write_window_model(tmp_path / "model")
    with serving(model, tmp_path) as server:
        prompt, expected = cold_and_from_the_disk(server)
        assert server.log().count("nvme_ssd tier /") == 2
        (window,) = [line for line in server.log().splitlines() if "(pool swa): " in line]
        slab = Path(window.split("nvme_ssd tier ")[1].split(" (pool")[0])
        damaged_is_computed(server, prompt, expected, slab)
    closed = [line for line in server.log().splitlines() if "nvme_ssd tier closed (pool swa)" in line]
    assert closed
    assert " 0 pages written" not in closed[0]
