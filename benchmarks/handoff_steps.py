"""Stops and kills a real prefill or decode vLLM at every message of a hand-off, and asks what the client is told.

Options: words (`stopped`, `decode killed`); only the rows that say one of them.

Between the engines stands somebody who sees the messages: he stops an engine (SIGSTOP, for 3 s) or kills it (SIGKILL;
it is started again) when the first message of that kind comes by, before he passes it on. What vLLM's own NixlConnector
says at those of these moments that it has, `handoff_faults` and `handoff_cable` show.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from benchmarks.handoff_columns import Column, Held, OurPair, run_columns
from benchmarks.handoff_middle import KINDS, SIDES, Engines, Middle, Plan
from tests.vllm.handoff_tickets import signed
from tests.vllm.pair import Pair

STANDS_SECONDS = 3.0
#: Only those who meet say these.
GREETINGS = ("Hello", "Welcome")


class Steps(Column):
    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        self._engines = Engines(pair)

    def rows(self) -> Iterator[tuple[str, Callable[[], str]]]:
        for how in ("stopped", "killed"):
            for side in SIDES:
                for step in KINDS:
                    if (how, side) == ("killed", "decode") and step in GREETINGS:
                        continue  # nobody has been promised anything yet
                    yield f"{side} {how} at {step}", partial(self._row, side, how, step)

    def _row(self, side: str, how: str, step: str) -> str:
        acted = threading.Event()

        def act() -> None:
            if how == "killed":
                self._engines.kill(side, step)
            else:
                self._engines.stop_for(side, STANDS_SECONDS)
            acted.set()  # now there is something to settle

        def has_come() -> bool:
            return acted.wait(30.0)

        with closing(Middle(self.pair._peer_port, random.Random(1))) as middle:
            if step not in GREETINGS:
                self.judge(self._through(middle))
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
    return run_columns({"dynamo": partial(OurPair, transports="tcp")}, Steps, "", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
