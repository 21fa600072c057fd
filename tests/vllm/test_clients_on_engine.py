"""Official clients, unchanged, before the proxy and a real vLLM: they hear what the engine itself would tell them."""

from __future__ import annotations

from typing import Any

import anthropic
import openai
import pytest

pytest.importorskip("vllm")

from tests.proxy.proxy_fakes import proxy_before, run
from tests.vllm.proxied import PATIENT, Standing, aside
from tools.server_process import ServerProcess
from tools.vllm_server import MODEL_NAME

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

MESSAGES: Any = [{"role": "user", "content": "tell me a story of two numbers"}]
ASKED: Any = {"model": MODEL_NAME, "max_tokens": 12, "temperature": 0}
GREEDY: Any = {"model": MODEL_NAME, "max_tokens": 12, "extra_body": {"temperature": 0}}


def openai_says(url: str) -> list[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        models = [model.id for model in client.models.list()]
        chat = client.chat.completions.create(messages=MESSAGES, **ASKED)
        streamed = client.chat.completions.create(messages=MESSAGES, stream=True, **ASKED)
        parts = [choice.delta.content or "" for event in streamed for choice in event.choices]
        plain = client.completions.create(prompt="one two three", logprobs=1, **ASKED)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(messages=MESSAGES, **{**ASKED, "model": "none"})
    assert "".join(parts) == chat.choices[0].message.content
    return [models, chat.choices[0].message.content, chat.usage, plain.choices[0].text, plain.choices[0].logprobs]


def anthropic_says(url: str) -> list[Any]:
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
        whole = client.messages.create(messages=MESSAGES, **GREEDY)
        with client.messages.stream(messages=MESSAGES, **GREEDY) as stream:
            text = "".join(stream.text_stream)
        count = client.messages.count_tokens(model=MODEL_NAME, messages=MESSAGES)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(messages=MESSAGES, **{**GREEDY, "model": "none"})
    assert text == whole.content[0].text
    return [text, whole.stop_reason, whole.usage.output_tokens, count.input_tokens]


@pytest.mark.parametrize("says", [openai_says, anthropic_says])
def test_a_client_hears_what_the_engine_tells(engine: ServerProcess, says: Any) -> None:
    async def body() -> None:
        async with proxy_before(Standing(engine.url), timeouts=PATIENT) as proxy:
            direct = await aside(lambda: says(engine.url))
            assert await aside(lambda: says(f"http://127.0.0.1:{proxy.port}")) == direct

    run(body())
