"""Stops and kills a real prefill or decode vLLM at every step of a hand-off, and asks what the client is told.

Options: `changed`, `stopped` or `killed` alone. Between the engines stands somebody who sees the messages. He changes
the greetings to those of strangers; and he stops an engine (SIGSTOP, for 3 s) or kills it (SIGKILL; it is started
again) when the first message of that kind comes by, before he passes it on. The answer of the faulted request, and that
of the next one, are compared with those of the prefill engine alone, token by token; weights in float32, so that the
shape of a batch changes no token.
"""

from __future__ import annotations

import http.client
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec.structs import replace

from benchmarks.handoff_middle import KINDS, SIDES, Engines, Middle, Plan
from benchmarks.handoff_storm import CHUNKS, StormPair, is_clean
from dynamo_connectors.transport.messages import MAGIC, Codec, Hello, Reply, Request, Welcome
from tests.vllm.client import prompt, wait_until
from tests.vllm.handoff_tickets import SECRET, signed
from tools.tiny_model import make_model

STANDS_SECONDS = 3.0
_CODEC = Codec(SECRET)
#: What makes a decode engine a stranger, in its Hello.
HELLOS: dict[str, Callable[[Hello], bytes]] = {
    "other model": lambda hello: _CODEC.encode(replace(hello, namespace=b"other")),
    "other block size": lambda hello: _CODEC.encode(replace(hello, row_bytes=hello.row_bytes + 4096)),
    "other version": lambda hello: _versioned(_CODEC.encode(hello)),
    "other secret": lambda hello: Codec(b"another fleet's").encode(hello),
    "noise": lambda hello: os.urandom(200),
}
#: Only those who meet say these.
GREETINGS = ("Hello", "Welcome")


def _versioned(frame: bytes) -> bytes:
    """The same, signed, of the version after ours."""
    head = len(MAGIC) + 1
    body = bytes([frame[len(MAGIC)] + 1]) + frame[head + 32 :]
    return MAGIC + body[:1] + _CODEC._mac(body) + body[1:]


def cut_short(message: Request | Reply, frame: bytes) -> bytes:
    if not isinstance(message, Welcome):
        return frame
    return _CODEC.encode(replace(message, metadata=message.metadata[: len(message.metadata) // 2]))


class Steps:
    def __init__(self, pair: StormPair) -> None:
        self._pair = pair
        self._engines = Engines(pair)
        self._seeds = iter(range(1, 1 << 20))
        self._middle: Middle | None = None

    def rows(self, how: str) -> Iterator[tuple[str, str]]:
        if how == "changed":
            yield from self._strangers()
            return
        for side in SIDES:
            for step in KINDS:
                if how == "killed" and side == "decode" and step in GREETINGS:
                    continue  # nobody has been promised anything yet
                self._meet_anew()
                yield f"{side} {how} at {step}", self._row(side, how, step)

    def _strangers(self) -> Iterator[tuple[str, str]]:
        for what, change in HELLOS.items():
            middle = self._meet_anew()
            middle.frame_of = lambda message, frame, change=change: (  # type: ignore[misc]
                change(message) if isinstance(message, Hello) else frame
            )
            yield what, self._ask()
        self._meet_anew().frame_of = cut_short
        yield "metadata cut short", self._ask()

    def close(self) -> None:
        if self._middle is not None:
            self._middle.close()

    def _meet_anew(self) -> Middle:
        """At another address, so with a greeting."""
        self.close()
        self._middle = Middle(self._pair._peer_port, random.Random(1))
        return self._middle

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
                for how in arguments or ("changed", "stopped", "killed"):
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
