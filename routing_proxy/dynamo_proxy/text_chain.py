"""What a request asks an engine to prefill: one canonical rendering of its prompt, and the hash chain over
it.

Requests that share a prompt prefix share a chain prefix. The rendering need not equal the engine's chat
template: it only has to be the same bytes for the same conversation, with earlier turns first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson
from xxhash import xxh3_64_intdigest

from .block_hash import root_hash, token_chain

TEXT_BLOCK_BYTES = 256
# As coarse as a text block.
APPROX_BLOCK_TOKENS = 64
_SORTED = orjson.OPT_SORT_KEYS
# Request fields that change how a prompt is rendered before its first message.
_PREAMBLE = (
    "tools",
    "instructions",
    "system",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "functions",
)


class Prompt(NamedTuple):
    """The routable part of a request. Either `text` or `token_ids` is set, or neither; `chain` is over it."""

    model: str = ""
    root: int = 0
    text: bytes = b""
    chain: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    tokenize: dict[str, Any] | None = None  # the engine's /tokenize question


def text_chain(text: bytes, seed: int) -> tuple[int, ...]:
    """Chained xxh3 over 256-byte blocks; a partial last block is a node of its own."""
    node = seed
    return tuple(
        [
            node := xxh3_64_intdigest(text[start : start + TEXT_BLOCK_BYTES], node)
            for start in range(0, len(text), TEXT_BLOCK_BYTES)
        ]
    )


def read_prompt(body: dict[str, Any], lora_names: frozenset[str] = frozenset()) -> Prompt:
    """Find the prompt in a decoded request of any supported route; fields of odd types are ignored.

    `lora_names` are the served models that are LoRA adapters: their blocks live in a tree of their own.
    """
    model = _text(body.get("model"))
    salt = _text(body.get("cache_salt")) + _text(body.get("extra_key"))
    lora = model if model in lora_names else _text(body.get("lora_path"))
    root = root_hash(lora, salt)
    messages = body.get("messages")
    if isinstance(messages, list):
        text = _render_chat(body, messages)
        ask: dict[str, Any] = {
            key: body[key] for key in ("messages", "tools", "chat_template", "chat_template_kwargs") if key in body
        }
        return _text_prompt(model, root, text, ask)
    for key in ("prompt", "input", "text", "input_ids"):
        value = body.get(key)
        if value is not None:
            return _plain_prompt(model, root, body, value)
    return Prompt(model, root)


def _plain_prompt(model: str, root: int, body: dict[str, Any], value: Any) -> Prompt:
    # A batch is placed by its first prompt; the others ride along.
    if isinstance(value, list) and value and isinstance(value[0], (list, str)):
        value = value[0]
    if isinstance(value, str):
        text = _preamble(body) + value.encode("utf-8", "surrogatepass")
        return _text_prompt(model, root, text, {"prompt": value})
    if isinstance(value, list) and value and all(type(item) is int and 0 <= item < 1 << 62 for item in value):
        chain = tuple(token_chain(value, APPROX_BLOCK_TOKENS, root))
        return Prompt(model, root, chain=chain, token_ids=tuple(value))
    if isinstance(value, list):  # the items of the Responses API
        return _text_prompt(model, root, _render_chat(body, value), None)
    return Prompt(model, root)


def _text_prompt(model: str, root: int, text: bytes, ask: dict[str, Any] | None) -> Prompt:
    seed = xxh3_64_intdigest(model.encode("utf-8", "surrogatepass"), root)
    return Prompt(model, root, text, text_chain(text, seed), tokenize=ask)


def _render_chat(body: dict[str, Any], messages: list[Any]) -> bytes:
    parts = []
    for message in messages:
        if not isinstance(message, dict):
            parts.append(orjson.dumps(message, option=_SORTED).decode())
        elif len(message) == 2 and "role" in message and type(content := message.get("content")) is str:
            parts += (_text(message["role"]), "\x1f", content, "\x1e")  # what nearly all messages are
        else:
            parts.append(_render_message(message))
    return _preamble(body) + "".join(parts).encode("utf-8", "surrogatepass")


def _render_message(message: dict[str, Any]) -> str:
    role, content = _text(message.get("role")), message.get("content")
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "\n".join(part["text"] for part in content)
    shown = content if isinstance(content, str) else orjson.dumps(content, option=_SORTED).decode()
    tail = orjson.dumps(rest, option=_SORTED).decode() if rest else ""
    return f"{role}\x1f{shown}{tail}\x1e"


def _preamble(body: dict[str, Any]) -> bytes:
    found = [body[key] for key in _PREAMBLE if body.get(key) is not None]
    return orjson.dumps(found, option=_SORTED) if found else b""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
