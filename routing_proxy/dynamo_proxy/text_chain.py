"""What a request asks an engine to prefill: one canonical rendering of its prompt, and the hash chain over
it.

Requests that share a prompt prefix share a chain prefix. The rendering need not equal the engine's chat
template: it only has to be the same bytes for the same conversation, with earlier turns first.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import Any, Final, final

import orjson
from xxhash import xxh3_64_intdigest

from .block_hash import root_hash
from .slo_classes import SloClass

# A chain is counted in units. Its first 16 nodes are one unit each, the rest four: a long prompt costs a quarter of the
# hashing and of the index, and what a coarse node can miss is little beside it. The lowest bit of a node says its size.
UNIT_BYTES: Final = 256
UNIT_TOKENS: Final = 64  # of a prompt that comes as token ids: as coarse as text
_FINE_NODES: Final = 16
_COARSE_UNITS: Final = 4
_EVEN: Final = (1 << 64) - 2
_SORTED: Final = orjson.OPT_SORT_KEYS
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
_PREAMBLE_SET: Final = frozenset(_PREAMBLE)
_TREE_FIELDS: Final = frozenset(("cache_salt", "extra_key", "lora_path"))
_TOKENIZE_FIELDS = ("messages", "tools", "chat_template", "chat_template_kwargs")


@final
class Prompt:
    """The routable part of a request. Either `text` or `token_ids` is set, or neither; `chain` is over it."""

    __slots__ = (
        "asked_model", "body", "chain", "explained", "model", "priority", "root", "session", "slo", "text", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        model: str = "",
        root: int = 0,
        text: bytes = b"",
        chain: tuple[int, ...] = (),
        token_ids: tuple[int, ...] = (),
        body: dict[str, Any] | str | None = None,
    ) -> None:
        self.model = model
        self.asked_model = model  # what its client calls it
        self.root = root
        self.text = text
        self.chain = chain
        self.token_ids = token_ids
        self.body = body  # what an engine could tokenise: a chat request, or a plain text
        self.session = ""  # requests of one session stay on one engine, if that is wanted
        self.priority = 0  # the smallest is served first, as in vLLM
        self.slo: SloClass | None = None  # when its first token is wanted
        self.explained = False  # somebody wants to know why it went where it went

    @property
    def question(self) -> dict[str, Any] | None:
        """The engine's /tokenize question for this prompt."""
        if isinstance(self.body, str):
            return {"prompt": self.body}
        return None if self.body is None else {key: self.body[key] for key in _TOKENIZE_FIELDS if key in self.body}


def text_chain(text: bytes, seed: int, unit_bytes: int = UNIT_BYTES) -> tuple[int, ...]:
    """Chained xxh3 over the blocks of a prompt; a partial last block is a node of its own."""
    digest, even = xxh3_64_intdigest, _EVEN
    node, fine_bytes = seed, _FINE_NODES * unit_bytes
    chain = []
    for start in range(0, min(len(text), fine_bytes), unit_bytes):
        node = digest(text[start : start + unit_bytes], node) & even
        chain.append(node)
    size = _COARSE_UNITS * unit_bytes
    for start in range(fine_bytes, len(text), size):
        node = digest(text[start : start + size], node) | 1
        chain.append(node)
    return tuple(chain)


def chain_units(depth: int) -> int:
    """How many units the first `depth` nodes of a chain cover."""
    return depth if depth <= _FINE_NODES else _FINE_NODES + (depth - _FINE_NODES) * _COARSE_UNITS


def node_units(node: int) -> int:
    """How many units one node covers."""
    return _COARSE_UNITS if node & 1 else 1


@lru_cache(maxsize=4096)
def _tree(model: str, lora: str, salt: str) -> tuple[int, int]:
    """The roots of the token tree and of the text tree of a model, an adapter and a salt."""
    root = root_hash(lora, salt)
    return root, xxh3_64_intdigest(model.encode("utf-8", "surrogatepass"), root)


def read_prompt(body: dict[str, Any], lora_names: frozenset[str] = frozenset()) -> Prompt:
    """Find the prompt in a decoded request of any supported route; fields of odd types are ignored.

    `lora_names` are the served models that are LoRA adapters: their blocks live in a tree of their own.
    """
    model = _text(body.get("model"))
    lora, salt = model if model in lora_names else "", ""
    if not _TREE_FIELDS.isdisjoint(body):
        salt = _text(body.get("cache_salt")) + _text(body.get("extra_key"))
        lora = lora or _text(body.get("lora_path"))
    root, seed = _tree(model, lora, salt)
    messages = body.get("messages")
    if type(messages) is list:
        text = _render_chat(body, messages)
        return Prompt(model, root, text, text_chain(text, seed), (), body)
    for key in ("prompt", "input", "text", "input_ids"):
        value = body.get(key)
        if value is not None:
            return _plain_prompt(body, value, model, (root, seed))
    return Prompt(model, root)


def _plain_prompt(body: dict[str, Any], value: Any, model: str, tree: tuple[int, int]) -> Prompt:
    root, seed = tree
    # A batch is placed by its first prompt; the others ride along.
    if isinstance(value, list) and value and isinstance(value[0], (list, str)):
        value = value[0]
    if isinstance(value, str):
        text = _preamble(body) + value.encode("utf-8", "surrogatepass")
        return Prompt(model, root, text, text_chain(text, seed), (), value)
    if isinstance(value, list) and value and all(type(item) is int and 0 <= item < 1 << 62 for item in value):
        whole = array("q", value[: len(value) // UNIT_TOKENS * UNIT_TOKENS]).tobytes()
        return Prompt(model, root, b"", text_chain(whole, root, 8 * UNIT_TOKENS), tuple(value))
    if isinstance(value, list):  # the items of the Responses API
        text = _render_chat(body, value)
        return Prompt(model, root, text, text_chain(text, seed))
    return Prompt(model, root)


def _render_chat(body: dict[str, Any], messages: list[Any]) -> bytes:
    parts: list[str] = []
    for message in messages:
        if not isinstance(message, dict):
            parts.append(orjson.dumps(message, option=_SORTED).decode())
        elif len(message) == 2 and "role" in message and type(content := message.get("content")) is str:
            parts += (_text(message["role"]), "\x1f", content, "\x1e")  # what nearly all messages are
        else:
            parts.append(_render_message(message))
    text = "".join(parts)
    # Most prompts are plain ASCII, for which the codec has a shortcut that an error handler's name would close.
    return _preamble(body) + (text.encode() if text.isascii() else text.encode("utf-8", "surrogatepass"))


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
    if _PREAMBLE_SET.isdisjoint(body):
        return b""
    found = [body[key] for key in _PREAMBLE if body.get(key) is not None]
    return orjson.dumps(found, option=_SORTED) if found else b""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
