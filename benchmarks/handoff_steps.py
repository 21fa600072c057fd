"""Stops and kills a real prefill or decode vLLM at every step of a hand-off, and asks what the client is told.

Options: `stopped` or `killed` alone. Between the engines stands somebody who sees the messages, and stops the engine
(SIGSTOP, for 3 s) or kills it (SIGKILL; it is started again) when the first message of that kind comes by, before it is
passed on. The answer of the faulted request, and that of the next one, are compared with those of the prefill engine
alone, token by token; weights in float32, so that the shape of a batch changes no token.
"""

from __future__ import annotations

import http.client
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.handoff_middle import KINDS, SIDES, Engines, Middle, Plan
from benchmarks.handoff_storm import CHUNKS, StormPair, is_clean
from tests.vllm.client import prompt, wait_until
from tests.vllm.handoff_tickets import signed
from tools.tiny_model import make_model

STANDS_SECONDS = 3.0
#: Only those who meet say these.
GREETINGS = ("Hello", "Welcome")


class Steps:
    def __init__(self, pair: StormPair) -> None:
        self._pair = pair
        self._engines = Engines(pair)
        self._seeds = iter(range(1, 1 << 20))
        self._middle: Middle | None = None

    def rows(self, how: str) -> Iterator[tuple[str, str]]:
        for side in SIDES:
            for step in KINDS:
                if how == "killed" and side == "decode" and step in GREETINGS:
                    continue  # nobody has been promised anything yet
                self._meet_anew()
                yield f"{side} {how} at {step}", self._row(side, how, step)

    def close(self) -> None:
        if self._middle is not None:
            self._middle.close()

    def _meet_anew(self) -> None:
        """At another address, so with a greeting."""
        self.close()
        self._middle = Middle(self._pair._peer_port, random.Random(1))

    def _row(self, side: str, how: str, step: str) -> str:
        assert self._middle is not None
        if step not in GREETINGS:
            self._ask()

        def act() -> None:
            if how == "killed":
                self._engines.kill(side, step)
            else:
                self._engines.stop_for(side, STANDS_SECONDS)

        self._middle.breaks_in.append(Plan(KINDS[step], act))
        said = self._ask()
        assert not self._middle.breaks_in, f"no {step} came by"
        self._engines.settle()
        return f"{said}; the next one {self._ask()}"

    def _ask(self) -> str:
        assert self._middle is not None
        tokens = prompt(next(self._seeds), CHUNKS)
        alone = self._pair.prefill.complete(tokens).tokens
        ticket = signed({**self._pair.ticket(tokens), "remote_port": self._middle.port})
        started, before = time.monotonic(), self._pair.from_peer()
        try:
            said = self._pair.decode.complete(tokens, kv_transfer_params=ticket).tokens
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}, {time.monotonic() - started:.1f} s"
        seconds = time.monotonic() - started
        if said != alone:
            return "WRONG TOKENS"
        return f"right, {seconds:.1f} s, {'from the peer' if self._pair.from_peer() > before else 'computed'}"


def main(arguments: list[str]) -> int:
    os.environ["UCX_LOG_LEVEL"] = "error"
    wrong = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pair = StormPair(make_model(folder / "model"), folder, transports="tcp")
        try:
            pair.start()
            pair.decode.complete(prompt(0))  # a CPU worker of vLLM may die of SIGILL at a first forward of one token
            steps = Steps(pair)
            try:
                for how in arguments or ("stopped", "killed"):
                    for what, said in steps.rows(how):
                        wrong |= "WRONG" in said
                        print(f"{what:30} {said}", flush=True)
            finally:
                steps.close()
            wait_until(lambda: is_clean(pair), "nothing is leased, pinned or quarantined", 120.0)
            print("at the end no lease, no pin, no quarantine, no request is left")
        finally:
            pair.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
