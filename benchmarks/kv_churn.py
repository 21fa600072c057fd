"""Memory of what the proxy knows of KV caches under minutes of churn: it must stay where it is once its bounds are met.

    python -m benchmarks kv_churn [--minutes N] [--engines N] [--blocks N]

Engines store and evict for ever: event messages as vLLM's are decoded and applied, with blocks below HBM, cleared
caches, engines that restart (forgotten, same number again) and texts that are sent and tokenised. All bounds are small,
so that all of it changes many times. A line every tenth of the time; status 1 if the last is a tenth above the fourth.
"""

from __future__ import annotations

import argparse
import importlib
import random
import time
from collections import deque
from collections.abc import Iterator

import msgspec

from benchmarks.kv_index import resident_mb

_BLOCK, _EVENT, _PROMPT = 16, 16, 128  # tokens of a block, blocks of an event and of a prompt
_TEXT_BYTES = 8192


class Engine:
    """What one engine holds, oldest prompt first, and the messages that say so."""

    def __init__(self, blocks: int, source: random.Random) -> None:
        self._prompts: deque[list[int]] = deque()
        self._most = max(2, blocks // _PROMPT)
        self._source = source

    def compute(self) -> Iterator[bytes]:
        """A new prompt, and what it drives out."""
        names = [self._source.getrandbits(64) for _ in range(_PROMPT)]
        tokens = [self._source.randrange(150_000) for _ in range(_PROMPT * _BLOCK)]
        self._prompts.append(names)
        for start in range(0, _PROMPT, _EVENT):
            stored = {
                "type": "BlockStored", "block_hashes": names[start : start + _EVENT], "block_size": _BLOCK,
                "parent_block_hash": names[start - 1] if start else None, "lora_id": None, "lora_name": None,
                "token_ids": tokens[start * _BLOCK : (start + _EVENT) * _BLOCK], "medium": "GPU",
            }  # fmt: skip
            yield _batch(stored, {**stored, "medium": "CPU"})
        if len(self._prompts) > self._most:
            gone = self._prompts.popleft()
            yield _batch(
                *({"type": "BlockRemoved", "block_hashes": gone, "medium": medium} for medium in ("GPU", "CPU"))
            )

    def clear(self) -> bytes:
        self._prompts.clear()
        return _batch({"type": "AllBlocksCleared"})


def _batch(*events: dict[str, object]) -> bytes:
    return msgspec.msgpack.encode([0.0, list(events), 0])


def churn(minutes: float, count: int, blocks: int) -> list[float]:
    """Resident MB at the end of each tenth of the time."""
    importlib.import_module("dynamo_proxy.server")  # what a proxy has loaded
    from dynamo_proxy.knowledge import Knowledge
    from dynamo_proxy.kv_events import decode_batch
    from dynamo_proxy.text_chain import read_prompt
    from dynamo_proxy.token_memo import TokenMemo

    source, knowledge = random.Random(1), Knowledge()
    knowledge.memo = TokenMemo(4_000, 500_000)
    for slot in range(count):
        knowledge.set_capacity_tokens(slot, blocks * _BLOCK)
    engines = [Engine(blocks, source) for _ in range(count)]
    knowledge.event_mask = knowledge.exact_mask = (1 << count) - 1
    began, found, prompts = time.monotonic(), [], 0

    def apply(slot: int, message: bytes) -> None:
        for event in decode_batch(message)[0]:
            knowledge.exact.apply(slot, 0, event)

    while len(found) < 10:
        slot = prompts % count
        for message in engines[slot].compute():
            apply(slot, message)
        text = f"{source.getrandbits(128):032x}" * (_TEXT_BYTES // 32)
        prompt = read_prompt({"model": "m", "prompt": text})
        knowledge.matched_tokens(prompt, knowledge.event_mask, float(prompts))
        knowledge.sent(slot, prompt, float(prompts))
        ids = [source.randrange(150_000) for _ in range(_TEXT_BYTES // 4)]
        knowledge.memo.learn(prompt.chain, len(prompt.text), ids, prompt.root)
        prompts += 1
        if prompts % 997 == 0:
            apply(slot, engines[slot].clear())
        if prompts % 2003 == 0:
            knowledge.forget(slot)
            knowledge.event_mask = knowledge.exact_mask = (1 << count) - 1
            knowledge.set_capacity_tokens(slot, blocks * _BLOCK)
            engines[slot] = Engine(blocks, source)
        if time.monotonic() - began >= minutes * 6 * (len(found) + 1):
            found.append(resident_mb())
            held = len(knowledge.exact)
            print(
                f"{minutes * 6 * len(found):6.0f} s  {prompts} prompts  {held} blocks  {found[-1]:.1f} MB", flush=True
            )
    knowledge.check()
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kv_churn")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=5_000, help="that each engine holds")
    options = parser.parse_args(arguments)
    found = churn(options.minutes, options.engines, options.blocks)
    print(f"fourth tenth {found[3]:.1f} MB, last {found[-1]:.1f} MB: {found[-1] / found[3]:.3f}")
    return int(found[-1] > 1.1 * found[3])
