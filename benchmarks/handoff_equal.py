"""One prefill and one decode engine, then two and two: the answers of each are those of one stock engine, bit for bit.

    handoff_equal ARM FOLDER [PROMPTS [SECONDS]]

The arms: `alone` (a stock engine answers all prompts), `again` (it answers them once more, in a new process), `1p1d`,
`2p2d` (every prompt is handed over), `fetch` (decode engines are told who holds a prompt's blocks). What an arm has is
kept in FOLDER, and it goes on from there when SECONDS of asking were not enough. Without arguments: all arms with 200
prompts. Real vLLM servers on the tiny model. An engine has one request at a time: a batch rounds differently, on stock
vLLM too.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from benchmarks.handoff_columns import awake
from tests.vllm.client import Answer, VllmClient, prompt
from tests.vllm.pair import PREFILL
from tools.server_process import ServerProcess, free_port
from tools.tiny_model import make_model
from tools.vllm_server import BLOCK_TOKENS, MODEL_NAME, VllmOptions, vllm_server

CHUNKS = 2
HOST_GB = "0.1"
ARMS = ("alone", "again", "1p1d", "2p2d", "fetch")

Ask: TypeAlias = Callable[[VllmClient, VllmClient, list[int]], Answer]


def boot(stack: ExitStack, model: Path, flags_by_name: dict[str, list[str]]) -> list[VllmClient]:
    """All at once."""
    servers: list[ServerProcess] = []
    for name, flags in flags_by_name.items():
        server = vllm_server(name, model, model.parent / f"{name}.log", VllmOptions(extra=flags))
        server.env = {**server.env, "UCX_LOG_LEVEL": "error"}
        stack.callback(server.stop)
        servers.append(server.start())
    return [awake(server) for server in servers]


def flags_of(role: str) -> list[str]:
    flags = ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", HOST_GB, "--kvbm-load-gate", "off"]
    return [*flags, "--kvbm-role", role, "--kvbm-peer-port", str(free_port())]


def handed_over(prefill: VllmClient, decode: VllmClient, tokens: list[int]) -> Answer:
    body = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 1, "kv_transfer_params": PREFILL}
    ticket = prefill.post("/v1/completions", body)["kv_transfer_params"]
    return decode.complete(tokens, kv_transfer_params=ticket)


def fetched(holder: VllmClient, decode: VllmClient, tokens: list[int]) -> Answer:
    body: dict[str, Any] = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 1}
    told = holder.post("/v1/completions", {**body, "kv_transfer_params": {"kvbm_tell_peer": True}})
    hint = {**told["kv_transfer_params"], "kvbm_peer_tokens": len(tokens)}
    return decode.complete(tokens, kv_transfer_params=hint)


class Record:
    """Answers of one arm by seed, in a file that survives the run."""

    def __init__(self, folder: Path, arm: str) -> None:
        self._file = folder / f"{arm}.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self.answers = {seed: Answer(tuple(tokens), tuple(logs)) for seed, tokens, logs in map(json.loads, lines)}

    def add(self, seed: int, answer: Answer) -> None:
        self.answers[seed] = answer
        with self._file.open("a") as file:
            file.write(json.dumps([seed, answer.tokens, answer.logprobs]) + "\n")


class Work(NamedTuple):
    """Prompts by seed, those that are not answered yet, until the time is over."""

    record: Record
    prompts: int
    seconds: float

    def rounds(self, many: int) -> list[list[int]]:
        left = [seed for seed in range(1, self.prompts + 1) if seed not in self.record.answers]
        return [left[first : first + many] for first in range(0, len(left), many)]

    def do(self, ask: Callable[[int, int, int], Answer], many: int = 1) -> None:
        """`ask` gets a number from 0 to `many` - 1, that of the round, and a seed; so many at a time."""
        ends = time.monotonic() + self.seconds
        with ThreadPoolExecutor(many) as pool:
            for number, seeds in enumerate(self.rounds(many)):
                if time.monotonic() > ends:
                    return
                answers = list(pool.map(ask, range(many), [number] * many, seeds))
                for seed, answer in zip(seeds, answers, strict=True):
                    self.record.add(seed, answer)


def of_one(model: Path, work: Work) -> str:
    with ExitStack() as stack:
        (engine,) = boot(stack, model, {"stock": []})
        work.do(lambda _, __, seed: engine.complete(prompt(seed, CHUNKS)))
    return ""


def apart(model: Path, work: Work, many: int, ask: Ask) -> str:
    """`many` prefill and `many` decode engines; each meets each."""
    names = {f"{role}{number}": flags_of(role) for role in ("prefill", "decode") for number in range(many)}
    before = len(work.record.answers)
    with ExitStack() as stack:
        engines = boot(stack, model, names)
        prefill, decode = engines[:many], engines[many:]

        def answer(at: int, number: int, seed: int) -> Answer:
            return ask(prefill[at], decode[(at + number) % many], prompt(seed, CHUNKS))

        work.do(answer, many)
        came = sum(each.metric("dynamo_kvbm_hit_blocks_total", tier="peer") for each in decode)
    blocks = (len(work.record.answers) - before) * (len(prompt(0, CHUNKS)) // BLOCK_TOKENS)
    return f"; {came:.0f} of {blocks} blocks of this run came from a peer"


def run(arm: str, model: Path, folder: Path, count: int, seconds: float) -> bool:
    work, started = Work(Record(folder, arm), count, seconds), time.monotonic()
    if arm in ("alone", "again"):
        note = of_one(model, work)
    else:
        note = apart(model, work, 1 if arm == "1p1d" else 2, fetched if arm == "fetch" else handed_over)
    answers, alone = work.record.answers, Record(folder, "alone").answers
    both = answers.keys() & alone.keys()
    equal = sum(answers[seed] == alone[seed] for seed in both)
    print(
        f"{arm}: {len(answers)} of {count} prompts of {len(prompt(0, CHUNKS))} tokens answered, {equal} of {len(both)} "
        f"as alone in every token and logprob{note}; {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return equal == len(both)


def main(arguments: list[str]) -> int:
    count = int(arguments[2]) if len(arguments) > 2 else 200
    seconds = float(arguments[3]) if len(arguments) > 3 else float("inf")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments[1]) if len(arguments) > 1 else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = make_model(Path(temporary) / "model")
        good = [run(arm, model, folder, count, seconds) for arm in (arguments[:1] or ARMS)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
