"""Stops and kills a real prefill or decode vLLM at every message of a hand-off, and asks what the client is told.

Option: `stopped` or `killed` alone. Between the engines stands somebody who sees the messages: he stops an engine
(SIGSTOP, for 3 s) or kills it (SIGKILL; it is started again) when the first message of that kind comes by, before he
passes it on. What vLLM's own NixlConnector says at those of these moments that it has, `handoff_faults` and
`handoff_cable` show.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from functools import partial

from benchmarks.handoff_columns import LEFT, Column, Held, OurPair, run_columns
from benchmarks.handoff_middle import KINDS, SIDES, Engines, Middle, Plan
from tests.vllm.handoff_tickets import signed
from tests.vllm.pair import Pair

STANDS_SECONDS = 3.0
#: Only those who meet say these.
GREETINGS = ("Hello", "Welcome")


class Steps(Column):
    def __init__(self, pair: Pair, ways: tuple[str, ...]) -> None:
        super().__init__(pair)
        self._ways = ways
        self._engines = Engines(pair)

    def rows(self) -> Iterator[tuple[str, str]]:
        for how in self._ways:
            for side in SIDES:
                for step in KINDS:
                    if (how, side) == ("killed", "decode") and step in GREETINGS:
                        continue  # nobody has been promised anything yet
                    middle = Middle(self.pair._peer_port, random.Random(1))
                    try:
                        yield f"{side} {how} at {step}", self._row(middle, side, how, step)
                    finally:
                        middle.close()
        yield LEFT, self.left()

    def _row(self, middle: Middle, side: str, how: str, step: str) -> str:
        if step not in GREETINGS:
            self.judge(self._through(middle))

        acted = threading.Event()

        def act() -> None:
            if how == "killed":
                self._engines.kill(side, step)
            else:
                self._engines.stop_for(side, STANDS_SECONDS)
            acted.set()  # now there is something to settle

        def has_come() -> bool:
            return acted.wait(30.0)

        held = self._through(middle)
        middle.breaks_in.append(Plan(KINDS[step], act))
        said = self.judge_with_fault(lambda: None, has_come, held)
        self._engines.settle()
        return f"{said}; the next one {self.judge(self._through(middle))}"

    def _through(self, middle: Middle) -> Held:
        """A hand-off that he sees; at another address, so it begins with a greeting."""
        held = self.hold()
        return held._replace(ticket=signed({**held.ticket, "remote_port": middle.port}))


def main(arguments: list[str]) -> int:
    ways = tuple(arguments) or ("stopped", "killed")
    return run_columns({"dynamo": partial(OurPair, transports="tcp")}, partial(Steps, ways=ways))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
