"""The simulated engines (http_engines.py) as workers of NVIDIA Dynamo's runtime, so that its frontend can be replayed.

    DYN_FILE_KV=FOLDER python -m benchmarks.routing.dynamo_workers STATS_PORT COUNT SPEED CAPACITY_TOKENS MODEL_FOLDER

To be run by a Python that has ai-dynamo and orjson (file discovery, TCP, ZMQ: no etcd, no NATS). The model's tokeniser
takes four characters for a token, as the other engines do; blocks of the trace are KV blocks, told as events.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dynamo.llm import KvEventPublisher, ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

from benchmarks.routing.http_engines import BLOCK_CHARACTERS, Connection, HttpEngine, blocks_in, text_of
from benchmarks.routing.simulated import BLOCK_TOKENS, Running

_PIECE = 4  # characters of a token


def pieces(text: str) -> list[str]:
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def vocabulary() -> dict[str, int]:
    """Every piece that a prompt of the trace can have."""
    found = {"<unk>": 0}
    for number in range(10_000):
        found.setdefault(f"{number:04d}", len(found))
        found.setdefault(f"<{number % 1000:03d}", len(found))
    for offset in range(70):  # the text of a block begins at one of these
        for piece in pieces(text_of([offset * 61 % 70], BLOCK_TOKENS))[3:]:
            found.setdefault(piece, len(found))
        first = text_of([offset], BLOCK_TOKENS)[11]
        for number in range(100):
            found.setdefault(f"{number:02d}>{first}", len(found))
    return found


def write_model(folder: Path) -> dict[str, int]:
    """What a frontend wants to see of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = vocabulary()
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]{1,4}"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer = {"version": "1.0", "added_tokens": [], **nothing, "pre_tokenizer": split, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": len(ids), "max_position_embeddings": 1_000_000, "eos_token_id": 0,
        "bos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return ids


class Watched(dict[int, int]):
    """An engine's cached blocks; notes which came and went."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[int] = []
        self.removed: list[int] = []

    def __setitem__(self, block: int, references: int) -> None:
        if block not in self:
            self.stored.append(block)
        super().__setitem__(block, references)

    def __delitem__(self, block: int) -> None:
        self.removed.append(block)
        super().__delitem__(block)


class Sink:
    """Where an engine writes the answer to one request: how many tokens came, 0 at the end."""

    def __init__(self) -> None:
        self.tokens: asyncio.Queue[int] = asyncio.Queue()

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.tokens.put_nowait(0 if b"[DONE]" in data else 1)


class Worker:
    """One engine at Dynamo's request plane."""

    def __init__(self, engine: HttpEngine, ids: dict[str, int], publisher: KvEventPublisher) -> None:
        self._engine, self._ids, self._publisher = engine, ids, publisher
        self._pieces = {number: piece for piece, number in ids.items()}
        self._parents: dict[int, int | None] = {}
        self._blocks = Watched()
        engine.core._references = self._blocks

    async def generate(self, request: dict[str, Any], context: Any = None) -> AsyncIterator[dict[str, Any]]:
        prompt = request["token_ids"]
        text = "".join(self._pieces.get(number, "????") for number in prompt)
        blocks, sink = blocks_in(text), Sink()
        self._parents.update(zip(blocks, [None, *blocks], strict=False))
        limit = (request.get("stop_conditions") or {}).get("max_tokens") or 1
        self._engine.take(Running(0, blocks, max(1, len(prompt)), limit), sink)  # type: ignore[arg-type]
        made = 0
        while await sink.tokens.get():
            made += 1
            self._tell()
            yield {"token_ids": [made % 100 + 1], "index": 0}
        self._tell()
        yield {"token_ids": [], "index": 0, "finish_reason": "length"}

    def _tell(self) -> None:
        stored, removed = self._blocks.stored, self._blocks.removed
        self._blocks.stored, self._blocks.removed = [], []
        for block in stored:
            parent = self._parents[block]
            tokens = [self._ids.get(piece, 0) for piece in pieces(text_of([block], BLOCK_TOKENS))]
            above = None if parent is None else parent + 1
            self._publisher.publish_stored(tokens, [BLOCK_TOKENS], [block + 1], above)
        if removed:
            self._publisher.publish_removed([block + 1 for block in removed])


async def serve(port: int, count: int, speed: float, capacity_tokens: int, folder: Path) -> None:
    assert BLOCK_CHARACTERS == BLOCK_TOKENS * _PIECE
    ids, loop = write_model(folder), asyncio.get_running_loop()
    engines = [HttpEngine(capacity_tokens, speed) for _ in range(count)]
    serving, runtimes = [], []
    for engine in engines:
        runtime = DistributedRuntime(loop, "file", "tcp", event_plane="zmq")
        runtimes.append(runtime)
        endpoint = runtime.endpoint("dynamo.backend.generate")
        config = ModelRuntimeConfig()
        config.total_kv_blocks = capacity_tokens // BLOCK_TOKENS
        config.max_num_seqs, config.max_num_batched_tokens = 256, 8192
        await register_model(
            ModelInput.Tokens, ModelType.Chat | ModelType.Completions, endpoint, str(folder), "m",
            worker_type=WorkerType.Aggregated, kv_cache_block_size=BLOCK_TOKENS, runtime_config=config,
        )  # fmt: skip
        publisher = KvEventPublisher(endpoint, kv_block_size=BLOCK_TOKENS)
        serving.append(asyncio.ensure_future(endpoint.serve_endpoint(Worker(engine, ids, publisher).generate)))
    await loop.create_server(lambda: Connection(engines[0], engines), "127.0.0.1", port)
    await asyncio.gather(*serving)


if __name__ == "__main__":
    first, number, times, tokens = sys.argv[1:5]
    asyncio.run(serve(int(first), int(number), float(times), int(tokens), Path(sys.argv[5])))
