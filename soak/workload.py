"""What the clients ask, what the right answers are, and how each request ended."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tools.vllm_server import BLOCK_TOKENS, CHUNK_TOKENS, MODEL_NAME

FAMILIES = 10
MEMBERS = 4
SHARED_CHUNKS = 4
#: The longest prompt fills an object of the store (32 blocks); shorter ones never get there.
OWN_CHUNKS = (1, 2, 3, 6)
MAX_TOKENS = 8
#: Longer than any fault lasts: what takes longer hangs.
HUNG_SECONDS = 90.0
SAME_LOGPROB = 1e-4

Prompt = list[int]


def prompts() -> list[Prompt]:
    """Families that share a beginning, as conversations and system prompts do."""
    rng = random.Random(20261122)

    def tokens(count: int) -> Prompt:
        return [rng.randrange(10, 500) for _ in range(count)]

    made: list[Prompt] = []
    for _ in range(FAMILIES):
        shared = tokens(SHARED_CHUNKS * CHUNK_TOKENS)
        made += [shared + tokens(OWN_CHUNKS[member] * CHUNK_TOKENS + 4) for member in range(MEMBERS)]
    return made


def distinct_blocks() -> int:
    """Full KV blocks of all prompts together, shared ones once."""
    made = prompts()
    return len({tuple(prompt[:end]) for prompt in made for end in range(BLOCK_TOKENS, len(prompt) + 1, BLOCK_TOKENS)})


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def equals(self, other: Answer) -> bool:
        """In float32 an engine repeats its logprobs to six places; KV that is not its own moves them much further."""
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return self.tokens == other.tokens and all(abs(mine - theirs) < SAME_LOGPROB for mine, theirs in pairs)


def ask(url: str, prompt: Prompt) -> Answer:
    """A greedy answer."""
    with _post(url, prompt, {"logprobs": 1}) as response:
        choice = json.loads(response.read())["choices"][0]
    return Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))


def ask_and_leave(url: str, prompt: Prompt) -> None:
    """Starts a stream and hangs up."""
    _post(url, prompt, {"stream": True, "max_tokens": 200}).close()


def _post(url: str, prompt: Prompt, extra: dict[str, Any]) -> Any:
    body = {
        "model": MODEL_NAME, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0,
        "return_token_ids": True, "ignore_eos": True, **extra,
    }  # fmt: skip
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=HUNG_SECONDS)


@dataclass
class Tally:
    """How requests ended. Thread-safe."""

    ended: Counter[str] = field(default_factory=Counter)
    #: One line for each ending that must not happen.
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, how: str, line: str | None = None) -> None:
        with self._lock:
            self.ended[how] += 1
            if line is not None:
                self.faults.append(line)


class Clients:
    """`count` threads that ask until `stop`. A request that meets a killed engine may fail, no other one may."""

    def __init__(self, url: str, right: list[Answer], outages: Callable[[], int], count: int = 4) -> None:
        self._url, self._right, self._outages = url, right, outages
        self._prompts = prompts()
        self._stopping = threading.Event()
        self.tally = Tally()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        while not self._stopping.is_set():
            # The first families are asked for most, as some prompts always are.
            family = min(int(rng.expovariate(0.3)), FAMILIES - 1)
            self._one(family * MEMBERS + rng.randrange(MEMBERS), rng)

    def _one(self, index: int, rng: random.Random) -> None:
        outages, started = self._outages(), time.monotonic()
        try:
            if rng.random() < 0.05:
                ask_and_leave(self._url, self._prompts[index])
                self.tally.add("left")
                return
            answer = ask(self._url, self._prompts[index])
        except (OSError, http.client.HTTPException, urllib.error.URLError, ValueError) as error:
            waited = time.monotonic() - started
            if waited >= HUNG_SECONDS - 1:
                self.tally.add("hung", f"prompt {index} got no answer in {waited:.0f} s")
            elif self._outages() != outages or self._outages() % 2:
                self.tally.add("engine was down")
                self._stopping.wait(0.5)
            else:
                self.tally.add("failed", f"prompt {index} failed while the engine was up: {error!r}")
            return
        if answer.equals(self._right[index]):
            self.tally.add("right")
        else:
            since = f"{time.strftime('%H:%M:%S')}, asked {time.monotonic() - started:.1f} s before"
            self.tally.add("wrong", f"prompt {index} at {since}: {answer}, right is {self._right[index]}")
