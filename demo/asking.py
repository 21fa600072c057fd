"""Asks through the official `openai` client, streaming, and keeps what a reader of the demo wants to compare."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from openai import OpenAI

from tools.vllm_server import MODEL_NAME


class Answer(NamedTuple):
    text: str
    tokens: tuple[int, ...]
    ttft_seconds: float


def client_for(url: str) -> OpenAI:
    return OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120)


def complete(client: OpenAI, tokens: list[int], max_tokens: int = 8) -> Answer:
    """A completion of a prompt given as token ids."""
    started = time.perf_counter()
    stream = client.completions.create(
        model=MODEL_NAME,
        prompt=tokens,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return _read(stream, started, lambda choice: choice.text)


def chat(client: OpenAI, messages: list[Any], max_tokens: int) -> Answer:
    """One turn of a conversation."""
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return _read(stream, started, lambda choice: choice.delta.content)


def _read(stream: Any, started: float, text_of: Any) -> Answer:
    first: float | None = None
    text: list[str] = []
    tokens: list[int] = []
    for chunk in stream:
        for choice in chunk.choices:
            piece = text_of(choice)
            if piece and first is None:
                first = time.perf_counter() - started
            text.append(piece or "")
            tokens += getattr(choice, "token_ids", None) or ()
    ended = time.perf_counter() - started
    return Answer("".join(text), tuple(tokens), ended if first is None else first)
