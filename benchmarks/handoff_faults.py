"""Prefill and decode apart on real vLLM servers: the same faults caused on ours and on vLLM's own NixlConnector.

Options: one column alone (`dynamo` or `stock`), and words; only the rows that say one of them. The faults come between
the prefill engine's answer and the question to the decode engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.handoff_columns import Column, OurPair, StockPair, run_columns
from tests.vllm.client import wait_until

#: More than HBM and host memory hold.
OTHERS = 14


class Faults(Column):
    def rows(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "no fault, 20 prompts", partial(self.handed_over, 20)
        yield "another prompt's ticket", self._foreign
        yield "prefill stopped (SIGSTOP) after its answer", self._stopped
        yield "and after it goes on, 5 prompts", partial(self.handed_over, 5)
        yield "lease over, blocks re-used before decode reads", self._stale
        yield "prefill killed after its answer", self._killed
        yield "prefill back at the same address, old ticket", self._back
        yield "and new tickets, 5 prompts", partial(self.handed_over, 5)

    def _foreign(self) -> str:
        return self.judge(self.hold()._replace(ticket=self.pair.ticket(self.prompt())))

    def _stopped(self) -> str:
        held = self.hold()
        self.pair.prefill_server.stand_still()
        try:
            return self.judge(held)
        finally:
            self.pair.prefill_server.go_on()

    def _stale(self) -> str:
        held = self.hold()
        self._await_expiry()
        for _ in range(OTHERS):
            self.pair.prefill.complete(self.prompt(), max_tokens=1)
        return self.judge(held)

    def _await_expiry(self) -> None:
        names = ("dynamo_nixl_leases_ended_total", "vllm:nixl_num_kv_expired_reqs_total")

        def expired() -> float:
            self.pair.prefill.complete(self.prompt(), max_tokens=1)  # what expires is told by steps
            return sum(self.pair.prefill.metric(name) for name in names)

        before = expired()
        wait_until(lambda: expired() > before, "the lease has expired", 120.0)

    def _killed(self) -> str:
        self._old = self.hold()
        self.pair.prefill_server.kill()
        return self.judge(self._old)

    def _back(self) -> str:
        self.pair.prefill_server.start().wait_ready(600.0)
        return self.judge(self.hold()._replace(ticket=self._old.ticket))


def main(arguments: list[str]) -> int:
    columns = {"dynamo": partial(OurPair, transports="tcp"), "stock": partial(StockPair, transports="tcp")}
    return run_columns(columns, Faults, *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
