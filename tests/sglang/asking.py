"""How the engine tests ask: prompts that push others out of SGLang's levels, answers that the disk had part in."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.sglang.server import Answer, Server, prompts

_FLOOD = 6
_ATTEMPTS = 5
_PATIENCE_SECONDS = 60.0


def flood(server: Server, seed: int, count: int = _FLOOD) -> None:
    """Other prompts; the default number pushes everything else out of both of SGLang's own levels."""
    for prompt in prompts(seed, count):
        server.generate(prompt)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {_PATIENCE_SECONDS:.0f} s in vain until {what}")
        time.sleep(0.2)


def answer_from_storage(server: Server, prompt: list[int], expected: list[int]) -> Answer:
    """Asks until the disk had part in the answer. SGLang writes in the background and may drop a first write."""
    for attempt in range(_ATTEMPTS):
        flood(server, seed=1000 + attempt)
        answer = server.generate(prompt)
        assert answer.output == expected
        if answer.storage_tokens:
            return answer
        time.sleep(1)
    pytest.fail(f"no answer came from the disk in {_ATTEMPTS} attempts")
