"""The same text with and without an adapter, with other salts, behind other images: a real vLLM mixes no KV of them."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.vllm.client import Answer, VllmClient, prompt, serving
from tests.vllm.image_model import IMAGE_PIXELS, IMAGE_TOKENS, make_adapter, make_image_model
from tools.vllm_server import CHUNK_TOKENS, MODEL_NAME, VllmOptions, vllm_server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

BLOCKS_PER_PROMPT = 28
#: Of the image's two blocks and the text behind it: what `prompt` has, so that both end four tokens behind a chunk.
TOKENS = 7 * CHUNK_TOKENS + 4
#: <|user|>, <|end|>, <|assistant|>.
TEMPLATE_TOKENS = 3
ADAPTERS = ("formal", "casual")


@pytest.fixture(scope="module")
def client(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmClient]:
    folder = tmp_path_factory.mktemp("keys")
    model = make_image_model(folder / "model")
    adapters = [f"{name}={make_adapter(folder / name, seed)}" for seed, name in enumerate(ADAPTERS)]
    tiers = ["--kv-connector", "dynamo", "--kvbm-storage-tiers", "hbm,host_dram", "--kvbm-host-dram-gb", "0.1"]
    lora = ["--kvbm-load-gate", "off", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules"]
    options = VllmOptions(extra=[*tiers, *lora, *adapters])
    with serving(vllm_server("vllm-keys", model, logs / "vllm-keys.log", options)) as started:
        yield started


def picture(seed: int) -> str:
    pixels = random.Random(seed).randbytes(IMAGE_PIXELS * IMAGE_PIXELS * 3)
    image, file = Image.frombytes("RGB", (IMAGE_PIXELS, IMAGE_PIXELS), pixels), io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask_about(client: VllmClient, url: str, seed: int, **extra: object) -> Answer:
    """A digit is a token."""
    text = "".join(random.Random(seed).choices("0123456789", k=TOKENS - IMAGE_TOKENS - TEMPLATE_TOKENS))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0}
    rules = {"logprobs": True, "return_token_ids": True, "ignore_eos": True}
    answer = client.post("/v1/chat/completions", {**body, **rules, **extra})
    assert answer["usage"]["prompt_tokens"] == TOKENS
    (choice,) = answer["choices"]
    return Answer(tuple(choice["token_ids"]), tuple(entry["logprob"] for entry in choice["logprobs"]["content"]))


def computed_then_loaded(client: VllmClient, ways: dict[str, Callable[[], Answer]]) -> dict[str, Answer]:
    """Asks in each way, from an empty HBM: nothing of another way's is found; and again: all of its own."""
    before = _loaded(client)
    cold = {name: ask() for name, ask in ways.items()}
    assert _loaded(client) == before, "it was given another one's blocks"
    client.empty_hbm()
    for name, ask in reversed(ways.items()):
        assert ask() == cold[name], name
    assert _loaded(client) - before == len(ways) * BLOCKS_PER_PROMPT
    assert client.metric("dynamo_kvbm_load_failures_total") == 0
    return cold


def _loaded(client: VllmClient) -> float:
    return client.metric("dynamo_kvbm_hit_blocks_total", tier="host_dram")


def test_adapters_and_salts_have_blocks_of_their_own(client: VllmClient) -> None:
    text = prompt(1)
    cold = computed_then_loaded(
        client,
        {
            "plain": lambda: client.complete(text),
            "formal": lambda: client.complete(text, model="formal"),
            "casual": lambda: client.complete(text, model="casual"),
            "salted": lambda: client.complete(text, cache_salt="a tenant"),
            "other salt": lambda: client.complete(text, cache_salt="another tenant"),
            "salted, formal": lambda: client.complete(text, model="formal", cache_salt="a tenant"),
        },
    )
    assert cold["plain"] == cold["salted"] == cold["other salt"]
    assert cold["formal"] == cold["salted, formal"]
    assert len({cold[name].tokens for name in ("plain", *ADAPTERS)}) == 3, "the adapters change nothing"


def test_images_have_blocks_of_their_own(client: VllmClient) -> None:
    """The text is the same, and so are the token ids that stand for the image."""
    cold = computed_then_loaded(
        client,
        {
            "cat": lambda: ask_about(client, picture(1), 2),
            "dog": lambda: ask_about(client, picture(2), 2),
            "formal cat": lambda: ask_about(client, picture(1), 2, model="formal"),
            "salted dog": lambda: ask_about(client, picture(2), 2, cache_salt="a tenant"),
        },
    )
    assert cold["dog"] == cold["salted dog"]
    assert len({cold[name].tokens for name in ("cat", "dog", "formal cat")}) == 3, "the image changes nothing"
