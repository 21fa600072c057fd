"""Prefill and decode apart on real vLLM servers: the same faults caused on ours and on vLLM's own NixlConnector.

Options: prompts of the first line (default 20), and one column alone (`dynamo` or `stock`). vLLM's connector wants the
package `nixl` beside its build: `pip install --no-deps nixl`. Each answer is compared with that of one engine alone,
token by token.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from tests.vllm.client import prompt, wait_until
from tests.vllm.pair import Pair
from tools.server_process import free_port
from tools.tiny_model import make_model

#: Stock: its shortest useful one. Ours is fixed at 30 s.
LEASE_SECONDS = 12
#: More than HBM and host memory hold.
OTHERS = 14


class StockPair(Pair):
    """vLLM's own connector, as its documentation starts it."""

    def flags(self, role: str) -> list[str]:
        config = {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
            "kv_buffer_device": "cpu",
            "kv_connector_extra_config": {"kv_lease_duration": LEASE_SECONDS},
        }
        return ["--kv-transfer-config", json.dumps(config)]

    def env(self, role: str) -> dict[str, str]:
        port = self._peer_port if role == "prefill" else free_port()
        return {**super().env(role), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}


class Table:
    """One column: what a pair of engines answers, fault by fault."""

    def __init__(self, pair: Pair, prompts: int) -> None:
        self._pair = pair
        self._prompts = prompts
        self._seeds: Iterator[int] = count(1)

    def rows(self) -> Iterator[tuple[str, str]]:
        yield f"no fault, {self._prompts} prompts", self.no_fault()
        yield "another prompt's ticket", self.judge(self.prompt(), self._pair.ticket(self.prompt()))
        yield "prefill stopped (SIGSTOP) after its answer", self.stopped()
        yield "and after it goes on, 5 prompts", self.no_fault(5)
        yield "lease over, blocks re-used before decode reads", self.stale()
        yield "prefill killed after its answer", self.killed()
        yield "prefill back at the same address, old ticket", self.back()
        yield "and new tickets, 5 prompts", self.no_fault(5)

    def prompt(self) -> list[int]:
        return prompt(next(self._seeds))

    def judge(self, tokens: list[int], ticket: dict[str, Any], alone: tuple[int, ...] = ()) -> str:
        alone = alone or self._pair.prefill.complete(tokens).tokens
        started = time.monotonic()
        try:
            said = self._pair.decode.complete(tokens, kv_transfer_params=ticket).tokens
        except urllib.error.HTTPError as error:
            with error:
                said, what = (), f"HTTP {error.code}"
        except OSError as error:
            said, what = (), f"no answer ({type(error).__name__})"
        if said:
            what = "right" if said == alone else "WRONG TOKENS, HTTP 200"
        return f"{what}, {time.monotonic() - started:.1f} s"

    def no_fault(self, prompts: int = 0) -> str:
        right = 0
        for _ in range(prompts or self._prompts):
            tokens = self.prompt()
            right += self.judge(tokens, self._pair.ticket(tokens)).startswith("right")
        return f"{right} right"

    def stopped(self) -> str:
        tokens = self.prompt()
        alone, ticket = self._pair.prefill.complete(tokens).tokens, self._pair.ticket(tokens)
        self._pair.prefill_server.stand_still()
        try:
            return self.judge(tokens, ticket, alone)
        finally:
            self._pair.prefill_server.go_on()

    def stale(self) -> str:
        tokens = self.prompt()
        alone, ticket = self._pair.prefill.complete(tokens).tokens, self._pair.ticket(tokens)
        self._await_expiry()
        for _ in range(OTHERS):
            self._pair.prefill.complete(self.prompt(), max_tokens=1)
        return self.judge(tokens, ticket, alone)

    def _await_expiry(self) -> None:
        names = ("dynamo_nixl_leases_ended_total", "vllm:nixl_num_kv_expired_reqs_total")

        def expired() -> float:
            self._pair.prefill.complete(self.prompt(), max_tokens=1)  # what expires is told by steps
            return sum(self._pair.prefill.metric(name) for name in names)

        before = expired()
        wait_until(lambda: expired() > before, "the lease has expired", 120.0)

    def killed(self) -> str:
        tokens = self.prompt()
        alone, self._old = self._pair.prefill.complete(tokens).tokens, self._pair.ticket(tokens)
        self._pair.prefill_server.kill()
        return self.judge(tokens, self._old, alone)

    def back(self) -> str:
        self._pair.prefill_server.start().wait_ready(600.0)
        return self.judge(self.prompt(), self._old)


def column(name: str, make: Callable[[Path], Pair], prompts: int) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        pair = make(Path(folder))
        try:
            pair.start()
            # A CPU worker of vLLM may die of SIGILL when its first forward is a single token; a pulled prompt is that.
            pair.decode.complete(prompt(0))
            for row in Table(pair, prompts).rows():
                print(f"{name}: {row[0]}: {row[1]}", flush=True)
                rows.append(row)
        finally:
            pair.close()
    return rows


def main(arguments: list[str]) -> int:
    if importlib.util.find_spec("nixl") is None:
        print("vLLM's NixlConnector needs the package `nixl`: pip install --no-deps nixl")
        return 2
    prompts = int(arguments[0]) if arguments else 20
    only = arguments[1] if len(arguments) > 1 else ""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        columns = {}
        for name, kind in {"dynamo": Pair, "stock": StockPair}.items():
            if only in ("", name):
                columns[name] = column(name, partial(kind, model, transports="tcp"), prompts)
    print(f"\n{'fault':50}" + "".join(f"{name:34}" for name in columns))
    for rows in zip(*columns.values(), strict=True):
        print(f"{rows[0][0]:50}" + "".join(f"{said:34}" for _, said in rows))
    return 1 if any("WRONG" in said for _, said in columns.get("dynamo", ())) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
