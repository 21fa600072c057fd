"""A relayed event stream on tape: token ids are taken out of its events and kept, so that a broken stream can
go on elsewhere.

The engine is asked for token ids (`return_token_ids`); the client never sees them. When the engine is lost, the
prompt's and the relayed tokens go to another engine as one token prompt, and what it answers is dressed as the rest of
the first stream. Only whole events are relayed, so a stream on tape always ends between two events. Tokens whose text
was held back (half of a character) are not relayed yet: they are computed again.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any, ClassVar, Final, Protocol

import orjson

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GENERATE = "/generate"  # SGLang's own
#: What is still to be asked of an engine about a broken stream, (path, body) by (path, body); the request for its rest.
Rest = Generator[tuple[str, dict[str, Any]], Any, bytes]
#: Prompt ids that one stream may keep, as text. A longer prompt costs its stream the tape, not the answer.
MAX_PROMPT_ID_BYTES: Final = 1 << 20
_MAX_EVENT_BYTES: Final = 4 << 20
_IDS: Final = re.compile(rb'"token_ids":\s?\[([0-9, ]*)\]')
_PROMPT_IDS: Final = re.compile(rb'"prompt_token_ids":\s?\[([0-9, ]*)\]')
_NO_IDS: Final = b'"token_ids":null'
_NO_PROMPT_IDS: Final = b'"prompt_token_ids":null'
_OPEN: Final = b'"finish_reason":null'
_DONE: Final = b"data: [DONE]"
_LAST_CHUNK: Final = b"0\r\n\r\n"
# What a chat says about sampling and about whom it is from: the continuation is a completion with the same.
_CARRIED = frozenset(
    ("allowed_token_ids", "bad_words", "cache_salt", "frequency_penalty", "ignore_eos", "include_stop_str_in_output",
     "length_penalty", "logit_bias", "min_p", "model", "presence_penalty", "priority", "repetition_penalty", "seed",
     "session_id", "skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids", "stream_options",
     "temperature", "top_k", "top_p", "user", "vllm_xargs")
)  # fmt: skip
_LIMITS = ("max_completion_tokens", "max_tokens", "min_tokens")  # engines read "20" as 20; we do not count with it
# Any of these, if it says something, makes a stream one that token ids alone cannot continue.
_HINDERS = frozenset(
    ("audio", "best_of", "documents", "echo", "functions", "guided_choice", "guided_grammar", "guided_json",
     "guided_regex", "logprobs", "mm_processor_kwargs", "modalities", "prompt_embeds", "prompt_logprobs", "stop",
     "structured_outputs", "suffix", "thinking_token_budget", "tools", "top_logprobs", "truncate_prompt_tokens",
     "use_beam_search", "return_token_ids",
     "custom_logit_processor", "ebnf", "json_schema", "regex", "return_cached_tokens_details", "return_hidden_states",
     "return_input_ids_in_sglext", "return_meta_info", "return_output_ids_in_sglext", "return_prompt_token_ids",
     "return_routed_experts", "return_spec_tokens_details", "session_params", "stop_regex")
)  # fmt: skip
# What a stream of SGLang's own route may say to be one that token ids can continue.
_NATIVE = frozenset(
    ("cache_salt", "data_parallel_rank", "extra_key", "input_ids", "log_metrics", "lora_path", "model", "priority",
     "rid", "routed_dp_rank", "sampling_params", "session_id", "stream", "text")
)  # fmt: skip
_NATIVE_SAMPLING = frozenset(
    ("frequency_penalty", "ignore_eos", "logit_bias", "max_new_tokens", "min_new_tokens", "min_p", "n",
     "no_stop_trim", "presence_penalty", "repetition_penalty", "sampling_seed", "skip_special_tokens",
     "spaces_between_special_tokens", "stop_token_ids", "temperature", "top_k", "top_p")
)  # fmt: skip


class Frames(Protocol):
    """Turns the payload of an engine's chunks into chunks for the client."""

    failed: str  # why the answer is no answer although its connection lives; empty: it is one

    def feed(self, payload: bytes) -> bytes: ...
    def end(self) -> bytes: ...


class PlainFrames:
    """The payload as it came."""

    failed = ""

    def feed(self, payload: bytes) -> bytes:
        return framed(payload)

    def end(self) -> bytes:
        return _LAST_CHUNK


def is_resumable(path: str, body: dict[str, Any]) -> bool:
    """True for a stream that token ids can continue: one plain text answer, no grammar, tools, stop strings or
    media.
    """
    if path == GENERATE:
        return body.get("stream") is True and _is_resumable_natively(body)
    if body.get("stream") is not True or not _HINDERS.isdisjoint(name for name, value in body.items() if value):
        return False
    if body.get("n") not in (None, 1) or not all(type(body.get(name) or 0) is int for name in _LIMITS):
        return False
    kind = body.get("response_format")
    if kind is not None and not (isinstance(kind, dict) and kind.get("type") == "text"):
        return False
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("continuous_usage_stats"):
        return False
    if path == COMPLETIONS:
        prompt = body.get("prompt")
        return isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int)
    return path == CHAT and _is_text(body.get("messages"))


def _is_resumable_natively(body: dict[str, Any]) -> bool:
    asked, prompt = body.get("sampling_params") or {}, body.get("text")
    if not isinstance(asked, dict) or asked.get("n") not in (None, 1):
        return False
    said = {name for name, value in body.items() if value}, {name for name, value in asked.items() if value}
    if not (said[0] <= _NATIVE and said[1] <= _NATIVE_SAMPLING):
        return False
    if not all(type(asked.get(name) or 0) is int for name in ("max_new_tokens", "min_new_tokens")):
        return False
    if prompt is not None:
        return isinstance(prompt, str) and body.get("input_ids") is None
    ids = body.get("input_ids")
    return isinstance(ids, list) and bool(ids) and type(ids[0]) is int


def _is_text(messages: Any) -> bool:
    if not isinstance(messages, list):
        return False
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else 0
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                return False
        elif content is not None and not isinstance(content, str):
            return False
    return True


def plan_rest(tape: StreamTape, request_body: bytes, max_model_tokens: int) -> tuple[str, bytes]:
    """What to do with a broken stream: ("concluded", its last chunks), ("go_on", the request for its rest; empty:
    `rest` finds it), or ("not_resumable", nothing).
    """
    if not tape.can_resume:
        return "not_resumable", b""
    body = orjson.loads(request_body)
    if tape.finished or tape.done:
        said = tape.conclude(body)
        return ("concluded", said) if said else ("not_resumable", b"")
    if tape.must_ask:
        return "go_on", b""
    rest = tape.continuation(body, max_model_tokens)
    return ("go_on", rest) if rest else ("not_resumable", b"")


# What chunks of these sizes begin with.
_HEADS: Final = [b"%x\r\n" % size for size in range(2048)]


def framed(payload: bytes) -> bytes:
    """One chunk, or nothing: an empty chunk would end the answer."""
    size = len(payload)
    if size < len(_HEADS):
        return b"%b%b\r\n" % (_HEADS[size], payload) if size else b""
    return b"%x\r\n%b\r\n" % (size, payload)


class StreamTape:
    """One stream: what was relayed of it, and how to go on. `feed` on the hot path, the rest once per stream."""

    __slots__ = ("_base_tokens", "_empty", "_first", "_ids", "_is_chat", "_is_plain", "_prompt_ids", "_rest",
                 "_resumed", "_safe", "_text", "_usage_sent", "done", "failed", "finished")  # fmt: skip
    route: ClassVar[str] = COMPLETIONS  # that serves the rest
    only_kind: ClassVar[str] = ""  # of engines that do; empty: all
    asked_kind: ClassVar[str] = ""  # of engines that can be asked what the rest hangs on

    def __init__(self, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._text = b'"content":"' if is_chat else b'"text":"'
        self._empty = self._text + b'"'
        self._first = b""
        self._prompt_ids = b""
        self._ids: list[bytes] = []  # of each event, as text
        self._safe = 0  # events up to the last one whose text was relayed
        self._base_tokens = 0  # relayed by the engines before this one
        self._is_plain = True
        self._resumed = False
        self._usage_sent = False
        self._rest = b""
        self.finished = False  # the last token was relayed
        self.done = False  # and the end mark too
        self.failed = ""

    @property
    def tokens(self) -> int:
        """Tokens relayed."""
        return sum(count_ids(ids) for ids in self._ids[: self._safe])

    @property
    def must_ask(self) -> bool:
        """True if `rest` finds the request for the rest, not `continuation`."""
        return False

    @property
    def can_resume(self) -> bool:
        return self.finished or self.done or bool(self._prompt_ids and self._is_plain)

    def asking(self, body: bytes) -> bytes:
        """The request as an engine gets it: it asks for token ids as well."""
        return b'{"return_token_ids":true,' + body[body.index(b"{") + 1 :]

    def feed(self, payload: bytes) -> bytes:
        """Chunks for the client: the whole events among what came."""
        if self._rest:
            payload = self._rest + payload
        if payload.find(b"\n\n") + 2 == len(payload) > 1:  # one event, as nearly always
            self._rest = b""
            return framed(self._event(payload))
        end = payload.rfind(b"\n\n") + 2
        if end == 1:  # not one whole event
            self._rest = payload
            if len(payload) > _MAX_EVENT_BYTES:
                self.failed = "bad_response"
            return b""
        if end == len(payload):
            self._rest = b""
        else:
            self._rest, payload = payload[end:], payload[:end]
        return framed(b"".join([self._event(event + b"\n\n") for event in payload[:-2].split(b"\n\n")]))

    def end(self) -> bytes:
        """The engine's answer is over."""
        if not self.done:
            self.failed = "ended_early"
        return _LAST_CHUNK

    def _event(self, event: bytes) -> bytes:
        if self.failed or self._resumed:
            return b"" if self.failed else self._dressed(event)
        if not self._first:
            event = self._begin(event)
        match = _IDS.search(event)
        if match is None and b'"choices":[{' not in event:
            return self._other(event)
        if _OPEN not in event:
            self._close(event)
            if self.failed:
                return b""
        if match is None:
            if self._is_plain and self._text in event and self._empty not in event:
                self._is_plain = False  # an engine that keeps its ids to itself
            return event
        self._ids.append(match[1])
        start = event.find(self._text)
        if start >= 0:
            if not event.startswith(self._empty, start):
                self._safe = len(self._ids)
        elif b'"delta":{}' not in event:
            self._is_plain = False  # thoughts or tool calls: not to be had from a completion
        return event[: match.start()] + _NO_IDS + event[match.end() :]

    def _begin(self, event: bytes) -> bytes:
        """The first event carries the prompt's ids; what is left of it names the stream."""
        match = _PROMPT_IDS.search(event)
        if match is not None:
            if len(match[1]) <= MAX_PROMPT_ID_BYTES:
                self._prompt_ids = match[1]
            event = event[: match.start()] + _NO_PROMPT_IDS + event[match.end() :]
        self._first = event
        return event

    def _close(self, event: bytes) -> None:
        """The event that says why the answer ends: an engine that shuts down says "abort"."""
        choices = parsed(event).get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            reason = choices[0].get("finish_reason")
            if reason == "abort":
                self.failed = "aborted"
            elif reason is not None:
                self.finished = True

    def _other(self, event: bytes) -> bytes:
        """The end mark, the usage, or an error."""
        if event.startswith(_DONE):
            self.done = True
            return event
        said = parsed(event)
        error = said.get("error")
        if isinstance(error, dict) and _is_engines_fault(error):
            self.failed = "engine_error"
            return b""
        self._usage_sent = self._usage_sent or said.get("usage") is not None
        return event

    # --- going on elsewhere

    def conclude(self, body: dict[str, Any]) -> bytes:
        """Chunks that end a stream all of whose tokens were relayed."""
        if self.done:
            return _LAST_CHUNK
        events = b""
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage") and not self._usage_sent:
            usage = self._usage(sum(count_ids(ids) for ids in self._ids))
            events = event_bytes({**self._name(), "choices": [], "usage": usage})
        self.done = True
        return framed(events + _DONE + b"\n\n") + _LAST_CHUNK

    def continuation(self, body: dict[str, Any], max_model_tokens: int) -> bytes:
        """The completion request whose answer is the rest of this stream. `max_model_tokens` 0: not known.
        Empty if there is nothing left to ask for, or no saying how much.
        """
        self.rewind()
        self._resumed = True
        del self._ids[self._safe :]
        self._base_tokens = self.tokens
        prompt = orjson.loads(b"[" + b",".join([self._prompt_ids, *filter(None, self._ids)]) + b"]")
        asked = {name: value for name, value in body.items() if not self._is_chat or name in _CARRIED}
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or (0 if self._is_chat else 16)
        left = limit - self._base_tokens if limit else max_model_tokens - len(prompt)
        if left < 1:
            return b""
        asked.pop("kv_transfer_params", None)
        asked |= {"prompt": prompt, "max_tokens": left, "stream": True, "return_token_ids": True}
        if body.get("min_tokens"):
            asked["min_tokens"] = max(0, body["min_tokens"] - self._base_tokens)
        return orjson.dumps(asked)

    def rest(self, body: dict[str, Any]) -> Rest:
        """Finds the request for the rest of this stream, if an engine must be asked for it; see Rest."""
        raise NotImplementedError

    def rewind(self) -> None:
        """The next engine is asked, after one that relayed nothing."""
        self._rest, self.failed = b"", ""

    def _dressed(self, event: bytes) -> bytes:
        """An event of the second engine as one of the first stream."""
        if event.startswith(_DONE):
            self.done = True
            return event
        said = parsed(event)
        if isinstance(said.get("error"), dict):
            self.failed = "engine_error"
            return b""
        if choices := said.get("choices"):
            choice = self._taken(choices[0])
            if choice is None:
                return b""
            said["choices"] = [choice]
        if isinstance(said.get("usage"), dict):
            said["usage"] = self._usage(self._base_tokens + int(said["usage"].get("completion_tokens") or 0))
            self._usage_sent = True
        return event_bytes({**said, **self._name()})

    def _taken(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        reason, text = choice.get("finish_reason"), choice.get("text") or ""
        if reason == "abort":
            self.failed = "aborted"
            return None
        self._ids.append(",".join(map(str, choice.get("token_ids") or ())).encode())
        if text:
            self._safe = len(self._ids)
        self.finished = reason is not None
        choice.pop("prompt_token_ids", None)
        choice.pop("prompt_logprobs", None)
        choice["token_ids"] = None
        if self._is_chat:
            del choice["text"]
            choice["delta"] = {"content": text}
        return choice

    def _name(self) -> dict[str, Any]:
        """What all events of the stream have in common."""
        first = parsed(self._first)
        return {name: first[name] for name in ("id", "object", "created", "model") if name in first}

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        prompt = count_ids(self._prompt_ids)
        total = prompt + completion_tokens
        return {"prompt_tokens": prompt, "total_tokens": total, "completion_tokens": completion_tokens}

    def check(self) -> None:
        assert 0 <= self._safe <= len(self._ids), "more events are safe than were seen"
        assert len(self._rest) <= _MAX_EVENT_BYTES or self.failed, "an event without end"


def count_ids(ids: bytes) -> int:
    return ids.count(b",") + 1 if ids.strip() else 0


def event_bytes(said: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(said) + b"\n\n"


def parsed(event: bytes) -> dict[str, Any]:
    try:
        said = orjson.loads(event.removeprefix(b"data:"))
    except orjson.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}


def _is_engines_fault(error: dict[str, Any]) -> bool:
    code = error.get("code")
    return (type(code) is int and code >= 500) or error.get("type") == "InternalServerError"
