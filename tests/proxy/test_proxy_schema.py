"""/openapi.json is true: schemathesis asks a proxy whatever the document allows, and much that it does not."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.proxy.proxy_fakes import FakeEngine, proxy_before, run


@pytest.mark.timeout(300)
def test_what_the_document_says_is_what_the_proxy_does(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
                f"http://127.0.0.1:{proxy.port}/openapi.json", "--phases=coverage,fuzzing", "--max-examples=3",
                "--seed=1", "--generation-database=none", "--no-color", "--warnings=off",
                cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            said, _ = await process.communicate()
            assert process.returncode == 0, said.decode()
            assert {"/v1/chat/completions", "/generate"} <= {path for path, _, _ in engine.requests}

    run(body())
