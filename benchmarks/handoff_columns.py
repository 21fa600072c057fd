"""One table of faults in two columns: a prefill and a decode vLLM with dynamo, and with vLLM's own NixlConnector.

Weights in float32, so that the shape of a batch changes no token. Each answer is compared with that of one engine
alone, token by token.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import tempfile
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tests.vllm.client import VllmClient, prompt
from tests.vllm.pair import Pair
from tools.server_process import ServerProcess, free_port
from tools.tiny_model import make_model

#: Stock: its shortest useful one. Ours is fixed at 30 s.
LEASE_SECONDS = 12
#: How long what is held may stay after the last fault: longer than a lease, and than the oldest late READ.
PATIENCE_SECONDS = 100.0
#: The last row of a table.
LEFT = f"what engines at rest still hold, {PATIENCE_SECONDS:.0f} s later at most"
#: What holds blocks or requests, at rest none. Of either column.
HOLDS = (
    "dynamo_nixl_open_leases",
    "dynamo_nixl_quarantined_bytes",
    "dynamo_kvbm_pinned_blocks",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)


class OurPair(Pair):
    def flags(self, role: str) -> list[str]:
        return [*super().flags(role), "--dtype", "float32"]


class StockPair(Pair):
    """vLLM's own connector, as its documentation starts it. It wants the package `nixl` beside its build."""

    def flags(self, role: str) -> list[str]:
        if importlib.util.find_spec("nixl") is None:
            raise SystemExit("vLLM's NixlConnector needs the package `nixl`: pip install --no-deps nixl")
        config = {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
            "kv_buffer_device": "cpu",
            "kv_connector_extra_config": {"kv_lease_duration": LEASE_SECONDS},
        }
        return ["--kv-transfer-config", json.dumps(config), "--dtype", "float32"]

    def env(self, role: str) -> dict[str, str]:
        port = self._peer_port if role == "prefill" else free_port()
        return {**super().env(role), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}


class Held(NamedTuple):
    """A prompt, its answer, and where its KV is kept."""

    tokens: list[int]
    alone: tuple[int, ...]
    ticket: dict[str, Any]


class Column:
    """What a pair of engines answers, fault by fault."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._seeds: Iterator[int] = count(1)

    def rows(self) -> Iterator[tuple[str, Callable[[], str]]]:
        raise NotImplementedError

    def answers(self, words: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Of all rows, or of those that say one of `words`, one after the other; and what is left then."""
        for what, ask in self.rows():
            if not words or any(word in what for word in words):
                yield what, ask()
        yield LEFT, self.left()

    def prompt(self) -> list[int]:
        return prompt(next(self._seeds))

    def hold(self) -> Held:
        tokens = self.prompt()
        return Held(tokens, self.pair.prefill.complete(tokens).tokens, self.pair.ticket(tokens))

    def judge(self, held: Held, **more: Any) -> str:
        started = time.monotonic()
        try:
            said = self.pair.decode.complete(held.tokens, kv_transfer_params=held.ticket, **more).tokens
        except urllib.error.HTTPError as error:
            with error:
                said, what = (), f"HTTP {error.code}"
        except (OSError, http.client.HTTPException) as error:
            said, what = (), f"no answer ({type(error).__name__})"
        if said:
            what = "right" if said == held.alone else "WRONG TOKENS, HTTP 200"
        return f"{what}, {time.monotonic() - started:.1f} s"

    def handed_over(self, prompts: int) -> str:
        return f"{sum(self.judge(self.hold()).startswith('right') for _ in range(prompts))} right"

    def judge_with_fault(self, fault: Callable[[], object], at: Callable[[], bool], held: Held) -> str:
        """`at` returns when it is time for `fault`, False when that time did not come. Another request comes beside."""
        tokens = self.prompt()
        other = Held(tokens, self.pair.prefill.complete(tokens).tokens, {})
        with ThreadPoolExecutor(2) as pool:
            faulted = pool.submit(self.judge, held)
            seen = at()
            beside = pool.submit(self.judge, other)
            fault()
            return f"{'' if seen else 'no transfer was seen; '}{faulted.result()}; beside it {beside.result()}"

    def left(self) -> str:
        """What engines at rest still hold."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while found := self._left():
            if time.monotonic() > deadline:
                return ", ".join(found)
            time.sleep(1.0)
        return "nothing"

    def _left(self) -> list[str]:
        found = []
        for name, client in {"prefill": self.pair.prefill, "decode": self.pair.decode}.items():
            client.complete(prompt(1 << 20, 1), 1)  # gauges are published by steps
            found += [f"{name} {gauge} {value:g}" for gauge in HOLDS if (value := client.metric(gauge))]
        return found


def awake(server: ServerProcess) -> VllmClient:
    """Returns when it answers, with a client of it.

    A CPU worker of vLLM may die of SIGILL when its first forward is a single token; a pulled prompt is that.
    """
    server.wait_ready(600.0)
    client = VllmClient(server.url)
    client.complete(prompt(0))
    return client


def run_columns(
    columns: Mapping[str, Callable[[Path, Path], Pair]], table: Callable[[Pair], Column], only: str = "", *words: str
) -> int:
    """Prints each row as it comes, and the columns side by side. 1 when ours gave a wrong token or kept something.

    `only`: that column alone. `words`: those rows alone that say one of them; some rows need the one before.
    """
    said: dict[str, dict[str, str]] = {}
    for name, make in columns.items():
        if only in ("", name):
            said[name] = {}
            with tempfile.TemporaryDirectory() as folder:
                pair = make(make_model(Path(folder) / "model"), Path(folder))
                try:
                    awake(pair.start().decode_server)
                    for what, answer in table(pair).answers(words):
                        print(f"{name}: {what}: {answer}", flush=True)
                        said[name][what] = answer
                finally:
                    pair.close()
    print(f"\n{'fault':60}" + "".join(f"{name:50}" for name in said))
    for what in dict.fromkeys(what for rows in said.values() for what in rows):
        print(f"{what:60}" + "".join(f"{rows.get(what, '-'):50}" for rows in said.values()))
    ours = said.get("dynamo", {})
    return 1 if any("WRONG" in answer for answer in ours.values()) or ours.get(LEFT, "nothing") != "nothing" else 0
