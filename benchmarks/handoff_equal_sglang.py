"""One prefill and one decode SGLang: 200 prompts, their tokens and logprobs beside those of one server alone.

    handoff_equal_sglang alone FILE [PROMPTS]   one server answers all prompts, and the first 50 once more
    handoff_equal_sglang 1p1d FILE              each is asked of both engines at once, as SGLang's router does

Without arguments: both. Real SGLang 0.5.23 servers for CPU on a tiny model; one request at a time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from tests.sglang.apart import BOOT_SECONDS, answer, ask, make, started_fleet
from tests.sglang.server import prompts
from tests.sglang.tiny_model import write_tiny_model

_AGAIN = 50
_LENGTHS = (5, 16, 33, 100, 300, 700)


def prompts_of(count: int) -> list[list[int]]:
    return [prompts(seed, 1, _LENGTHS[seed % len(_LENGTHS)])[0] for seed in range(count)]


def equal(answers: list[object], others: list[object]) -> int:
    return sum(one == other for one, other in zip(answers, others, strict=True))


def alone(model: Path, file: Path, count: int) -> bool:
    server = make("alone", model, model.parent)
    try:
        server.start().wait_ready(BOOT_SECONDS)
        answers = [answer(ask(server, tokens)) for tokens in prompts_of(count)]
        # Old ones have left its KV cache (4,096 tokens) long since.
        again = [answer(ask(server, tokens)) for tokens in prompts_of(min(_AGAIN, count))]
    finally:
        server.stop()
    file.write_text(json.dumps(answers))
    same = equal(list(again), list(answers[: len(again)]))
    print(f"one server: {count} prompts answered; the first {len(again)} once more: {same} equal", flush=True)
    return same == len(again)


def apart(model: Path, file: Path) -> bool:
    expected = [(tokens, logprobs) for tokens, logprobs in json.loads(file.read_text())]
    with started_fleet(model, model.parent) as fleet:
        started = time.monotonic()
        answers = [answer(fleet.ask(tokens)) for tokens in prompts_of(len(expected))]
        seconds = time.monotonic() - started
    same = equal(list(answers), list(expected))
    same_tokens = sum(one[0] == other[0] for one, other in zip(answers, expected, strict=True))
    print(
        f"1P1D: {same} of {len(expected)} answers equal in every token and logprob, {same_tokens} in every token; "
        f"{seconds:.1f} s",
        flush=True,
    )
    return same == len(expected)


def main(arguments: list[str]) -> int:
    arms = arguments[:1] or ["alone", "1p1d"]
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model")
        file = Path(arguments[1]) if len(arguments) > 1 else Path(folder) / "answers.json"
        count = int(arguments[2]) if len(arguments) > 2 else 200
        good = True
        for arm in arms:
            good &= alone(model, file, count) if arm == "alone" else apart(model, file)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
