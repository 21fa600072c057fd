"""What the two halves of a disaggregated request are sent: a prefill engine computes the prompt, another one goes on.

vLLM: the prefill engine answers with a ticket (`kv_transfer_params`), which goes to the decode engine as it came.
SGLang: both are asked at once, and meet in a room of the prefill engine's bootstrap server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from .hints import OF_PROXIES

PARAMS = "kv_transfer_params"
# What only a proxy may say to an engine about the other half of a request.
ROOM_FIELDS = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
INTERNAL_FIELDS = frozenset((*ROOM_FIELDS, PARAMS))
#: What SGLang's engines serve together.
ROOM_ROUTES = frozenset(("/v1/chat/completions", "/v1/completions", "/generate"))
#: Where they read prompts; only these make a batch. A chat is one, whatever else its body says.
_PROMPTS = {"/v1/completions": ("prompt",), "/generate": ("text", "input_ids")}
_REMOTE = ("do_remote_", "remote_")
#: Where vLLM reads them.
PARAMS_ROUTES = frozenset(("/v1/chat/completions", "/v1/completions"))
# Any of these, if it says something, needs the prompt's own outputs where the answer is made, or several prompts.
_HINDERS = ("echo", "prompt_logprobs", "best_of", "use_beam_search", "prompt_embeds")
_OF_THE_ANSWER = frozenset(("stream", "stream_options", "min_tokens", "max_completion_tokens", "return_token_ids"))
# As vLLM's own proxies write it.
_ASKS = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip


def without_internal(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body as a client may send it: hints for the block manager stay, what names another engine goes."""
    kept = {name: value for name, value in body.items() if name not in INTERNAL_FIELDS}
    params = body.get(PARAMS)
    if isinstance(params, dict):
        hints = {
            name: value for name, value in params.items() if not name.startswith(_REMOTE) and name not in OF_PROXIES
        }
        if hints:
            kept[PARAMS] = hints
    return kept


def prefill_body(path: str, body: bytes) -> bytes | None:
    """The prefill engine's half of a request to vLLM; None if it cannot be halved."""
    if path not in PARAMS_ROUTES:
        return None
    asked = orjson.loads(body)
    if any(asked.get(name) for name in _HINDERS) or asked.get("n") not in (None, 1) or _is_batch(asked.get("prompt")):
        return None
    half = {name: value for name, value in asked.items() if name not in _OF_THE_ANSWER}
    half |= {"stream": False, "max_tokens": 1, PARAMS: {**_hints(asked), **_ASKS}}
    if "max_completion_tokens" in asked:
        half["max_completion_tokens"] = 1
    return orjson.dumps(half)


def in_a_room(path: str, body: bytes, host: str, port: int, draw: Callable[[], int]) -> tuple[dict[str, Any], bytes]:
    """What both halves of a request to SGLang are told, and the whole prefill half; `draw` gives unused rooms.

    A batch has a room for each of its prompts; lists of rooms for what is none end an engine.
    """
    asked = orjson.loads(body)
    prompts = next((value for name in _PROMPTS.get(path, ()) if (value := asked.get(name)) is not None), None)
    fields: dict[str, Any] = dict(zip(ROOM_FIELDS, (host, port, draw()), strict=True))
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        fields = {name: [value] * len(prompts) for name, value in fields.items()}
        fields["bootstrap_room"] = [draw() for _ in prompts]
    half = {name: value for name, value in asked.items() if name != "stream_options"}
    return fields, orjson.dumps({**half, **fields, "stream": False})


def ticket(answer: bytes) -> dict[str, Any] | None:
    """What a prefill engine's answer says about where its KV lies; None if it says nothing."""
    try:
        said = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return None
    params = said.get(PARAMS) if isinstance(said, dict) else None
    return params if isinstance(params, dict) and params.get("do_remote_prefill") else None


def with_params(body: bytes, params: Mapping[str, Any]) -> bytes:
    """A request to vLLM that says this, too (a ticket, hints): the rest of it stays as the client wrote it."""
    if PARAMS.encode() not in body:
        return with_fields(body, {PARAMS: params})
    asked = orjson.loads(body)
    return orjson.dumps({**asked, PARAMS: {**_hints(asked), **params}})


def with_fields(body: bytes, fields: Mapping[str, Any]) -> bytes:
    """A JSON object's text with fields before its own."""
    start = body.index(b"{") + 1
    return b"%b,%b" % (orjson.dumps(fields)[:-1], body[start:])


def _hints(asked: dict[str, Any]) -> dict[str, Any]:
    params = asked.get(PARAMS)
    return params if isinstance(params, dict) else {}


def _is_batch(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
