"""Streams of SGLang on tape that do not tell the ids of all their tokens: when one breaks, they are found out by asking
an engine, and shown to be right.

`rest` yields such questions, (path, body), is sent the answers, and returns the request for the rest of the stream; or
nothing where it cannot be shown that this begins with exactly the tokens that were relayed.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, ClassVar

import orjson

from .stream_tape import CHAT, GENERATE, Rest, StreamTape, count_ids, event_bytes, parsed
from .tokens import read_token_ids

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
# Engines take as the text of tokens what they add to that of so many before them.
_CONTEXT_TOKENS = 5
# So many pieces of an answer are compared; those of a longer one are several events each.
_MAX_PIECES = 1024
_ENDS = 3  # of a completion, by events, of which one must be shown to be whole
_USAGE = re.compile(rb',"usage":(\{(?:[^{}]|\{[^{}]*\})*\})')
_COUNT = re.compile(rb'"completion_tokens":(\d+)')
_CONTENT = re.compile(rb'"content":("(?:[^"\\]|\\.)+")')
_NOT_TEXT = re.compile(rb'"reasoning_content":"[^"]|"tool_calls":\[')
_OPEN = b'"finish_reason":null'
# What means something else to the tokeniser than to a chat.
_NOT_OF_THE_PROMPT = ("add_special_tokens", "stream", "stream_options")
_DEFAULT_NEW_TOKENS = 128  # of /generate


class CompletionTape(StreamTape):
    """A completion. SGLang shows what is printable before a half of a character, with the tokens of the half: what was
    relayed last may be less than the text of its tokens, and what is missing would be lost.
    """

    __slots__ = ("_lasts",)
    asked_kind: ClassVar[str] = "sglang"

    def __init__(self) -> None:
        super().__init__(False)
        self._lasts: list[tuple[int, bytes]] = []  # events with a text, and how many are before it

    @property
    def must_ask(self) -> bool:
        return _may_lack(_text_of(self._lasts[-1][1])) if self._lasts else False

    def _event(self, event: bytes) -> bytes:
        safe = self._safe
        relayed = super()._event(event)
        if self._safe != safe:
            self._lasts = [*self._lasts[1 - _ENDS :], (safe, relayed)]
        return relayed

    def rest(self, body: dict[str, Any]) -> Rest:
        counts = [count_ids(ids) for ids in self._ids[: self._safe]]
        ids = orjson.loads(b"[" + b",".join([self._prompt_ids, *filter(None, self._ids[: self._safe])]) + b"]")
        texts = [_text_of(event) for _, event in self._lasts]
        ends = ["".join(texts[first:]) for first in range(len(texts))]
        spans = [(len(ids) - sum(counts[after:]), len(ids)) for after, _ in self._lasts]
        answer = yield DETOKENIZE, _asking_for_texts(body, ids, spans)
        # One is enough: an end that begins behind half of a character cannot match.
        shown = any(told == said for told, said in zip(_texts(answer), ends, strict=False))
        return self.continuation(body, 0) if shown else b""


class ChatTape(StreamTape):
    """A chat. Its events say how many tokens the answer has so far: cut there, its text must be the text of the
    tokens that a tokeniser makes of it.
    """

    __slots__ = ("_prompt_tokens", "_said", "_usage_told")
    route: ClassVar[str] = CHAT
    only_kind: ClassVar[str] = "sglang"
    asked_kind: ClassVar[str] = "sglang"

    def __init__(self) -> None:
        super().__init__(True)
        self._said: list[tuple[bytes, int]] = []  # the text of each event, as JSON, and the tokens up to its end
        self._usage_told = b""  # by the last of them
        self._prompt_tokens = 0

    @property
    def tokens(self) -> int:
        return self._said[-1][1] if self._said else 0

    @property
    def must_ask(self) -> bool:
        return True

    @property
    def can_resume(self) -> bool:
        return self.done or self.finished or bool(self._is_plain and self._said)

    def asking(self, body: bytes) -> bytes:
        if b'"stream_options"' not in body:
            return b'{"stream_options":{"continuous_usage_stats":true},' + body[body.index(b"{") + 1 :]
        asked = orjson.loads(body)
        options = asked.get("stream_options")
        options = options if isinstance(options, dict) else {}
        try:
            return orjson.dumps({**asked, "stream_options": {**options, "continuous_usage_stats": True}})
        except TypeError:  # nested deeper than orjson writes
            return body

    def _event(self, event: bytes) -> bytes:
        if self.failed:
            return b""
        if b'"choices":[{' not in event:
            return self._dressed(event) if self._resumed else self._other(event)
        if not self._first:
            self._first = event
        if _OPEN not in event:
            self._close(event)
            if self.failed:
                return b""
        event = self._noted(event)
        return self._dressed(event) if self._resumed and event else event

    def _noted(self, event: bytes) -> bytes:
        """An event without the counts that only we asked for."""
        usage, text = _USAGE.search(event), _CONTENT.search(event)
        if _NOT_TEXT.search(event) is not None or (text is not None and usage is None):
            self._is_plain = False  # thoughts or tool calls, or an engine that does not count
        if self._resumed and not (self._is_plain and (text is None or self._is_continued(usage))):
            self.failed = "not_exact"
            return b""
        if usage is None:
            return event
        count = _COUNT.search(usage[1])
        if count is not None and text is not None:
            self._said.append((text[1], self._base_tokens + int(count[1])))
            self._usage_told = usage[1]
        return event[: usage.start()] + event[usage.end() :]

    def _is_continued(self, usage: re.Match[bytes] | None) -> bool:
        """True if an engine counts what was relayed as its prompt: an older one ignores ids, and begins anew."""
        told = orjson.loads(usage[1]).get("prompt_tokens") if usage is not None else None
        return bool(told == self._prompt_tokens + self._base_tokens)

    def conclude(self, body: dict[str, Any]) -> bytes:
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage") and not (self._usage_sent or self.done):
            return b""  # a last token without a text was counted nowhere
        return super().conclude(body)

    def rest(self, body: dict[str, Any]) -> Rest:
        self.rewind()
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        if not self._prompt_tokens:
            self._prompt_tokens = int(orjson.loads(self._usage_told).get("prompt_tokens") or 0)
        question = {name: value for name, value in body.items() if name not in _NOT_OF_THE_PROMPT}
        # Refused by engines with a template of SGLang's own: its stop strings are not heeded for a prompt of ids.
        question["add_generation_prompt"] = True
        prompt = read_token_ids((yield TOKENIZE, question))
        texts = [orjson.loads(text) for text, _ in self._said]
        question = {"prompt": "".join(texts), "add_special_tokens": False}
        ids = read_token_ids((yield TOKENIZE, _named(body, question)))
        if len(prompt) != self._prompt_tokens or len(ids) != self.tokens or 0 < limit <= len(ids):
            return b""
        counts = [0, *(count for _, count in self._said)]
        sure = [end for end in range(1, len(texts)) if not _may_lack(texts[end - 1], counts[end] - counts[end - 1])]
        bounds = [0, *sure[:: -(-len(sure) // _MAX_PIECES) or 1], len(texts)]
        cuts = [counts[bound] for bound in bounds]
        pieces = ["".join(texts[start:end]) for start, end in pairwise(bounds)]
        spans = [(len(prompt) + start, len(prompt) + end) for start, end in pairwise(cuts)]
        answer = yield DETOKENIZE, _asking_for_texts(body, prompt + ids, spans)
        if _texts(answer) != pieces:
            return b""
        self._resumed, self._base_tokens = True, len(ids)
        asked = orjson.loads(self.asking(orjson.dumps(body)))
        asked["input_ids"] = prompt + ids
        for name in ("max_completion_tokens", "max_tokens"):
            if asked.get(name):
                asked[name] -= len(ids)
        if asked.get("min_tokens"):
            asked["min_tokens"] = max(0, asked["min_tokens"] - len(ids))
        return orjson.dumps(asked)

    def _taken(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        delta = choice.get("delta")
        return None if isinstance(delta, dict) and delta.get("role") else choice  # it was said before

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        total = self._prompt_tokens + completion_tokens
        return {
            "prompt_tokens": self._prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens
        }  # fmt: skip


class GenerateTape(StreamTape):
    """SGLang's native route. Each event holds the whole answer so far, with the ids of its tokens."""

    __slots__ = ("_last", "_named_first", "_relayed")
    route: ClassVar[str] = GENERATE
    only_kind: ClassVar[str] = "sglang"
    asked_kind: ClassVar[str] = "sglang"

    def __init__(self) -> None:
        super().__init__(False)
        self._last = b""  # event that was relayed
        self._named_first: dict[str, Any] = {}  # what the first engine called the answer, and counted
        self._relayed: tuple[str, list[int]] = ("", [])  # text and ids by the engines before this one

    @property
    def tokens(self) -> int:
        return len(parsed(self._last).get("output_ids") or ())

    @property
    def must_ask(self) -> bool:
        return True

    @property
    def can_resume(self) -> bool:
        return self.done or self.finished or bool(self._last)

    def asking(self, body: bytes) -> bytes:
        return body

    def conclude(self, body: dict[str, Any]) -> bytes:
        return super().conclude({})

    def _event(self, event: bytes) -> bytes:
        if self.failed:
            return b""
        if event.startswith((b"data: [DONE]", b'data: {"error"')):
            return self._dressed(event) if self._resumed else self._other(event)
        if self._resumed:
            event = self._whole(event)
        if _OPEN not in event and (reason := _reason(event)) is not None:
            self.failed = "aborted" if reason == "abort" else self.failed
            self.finished = not self.failed
        if self.failed:
            return b""
        self._last = event
        return event

    def _whole(self, event: bytes) -> bytes:
        """An event of a later engine as one of the whole answer."""
        said = parsed(event)
        meta, ids, (text, before) = said.get("meta_info"), said.get("output_ids"), self._relayed
        if not (isinstance(meta, dict) and isinstance(ids, list)) or meta.get("completion_tokens") != len(ids):
            self.failed = "not_exact"  # it tells what is new alone
            return b""
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "length":
            reason["length"] = len(before) + len(ids)
        meta |= {**self._named_first, "completion_tokens": len(before) + len(ids)}
        return event_bytes({**said, "text": text + (said.get("text") or ""), "output_ids": before + ids})

    def rest(self, body: dict[str, Any]) -> Rest:
        self.rewind()
        last = parsed(self._last)
        ids, meta, text = last.get("output_ids"), last.get("meta_info"), last.get("text")
        prompt = body.get("input_ids")
        if prompt is None:
            prompt = read_token_ids((yield TOKENIZE, _named(body, {"prompt": body["text"]})))
        if not (isinstance(ids, list) and isinstance(meta, dict)) or len(ids) != meta.get("completion_tokens"):
            return b""
        asked = body.get("sampling_params") or {}
        limit = asked.get("max_new_tokens", _DEFAULT_NEW_TOKENS)
        if len(prompt) != meta.get("prompt_tokens") or (limit is not None and limit <= len(ids)):
            return b""
        whole = (len(prompt), len(prompt) + len(ids))
        answer = yield DETOKENIZE, _asking_for_texts({**body, **asked}, prompt + ids, [whole])
        if not isinstance(text, str) or _texts(answer) != [text]:  # the last of it was held back: part of a character
            return b""
        asked = {**asked, "max_new_tokens": None if limit is None else limit - len(ids)}
        if asked.get("min_new_tokens"):
            asked["min_new_tokens"] = max(0, asked["min_new_tokens"] - len(ids))
        self._relayed, self._resumed = (text, ids), True
        self._named_first = {name: meta[name] for name in ("id", "prompt_tokens", "cached_tokens") if name in meta}
        kept = {name: value for name, value in body.items() if name != "text"}
        return orjson.dumps({**kept, "input_ids": prompt + ids, "sampling_params": asked})


def tape_for(path: str, kind: str) -> StreamTape:
    """The tape for a stream of this route from an engine of this kind."""
    if path == GENERATE:
        return GenerateTape()
    if kind == "sglang":
        return ChatTape() if path == CHAT else CompletionTape()
    return StreamTape(path == CHAT)


def _may_lack(text: str, tokens: int = 2) -> bool:
    """True if this may be only the printable part of the text of so many tokens: it ends with a space then, or with a
    Chinese character.
    """
    return text.endswith(" ") or (tokens > 1 and not text[-1:].isascii())


def _named(body: dict[str, Any], question: dict[str, Any]) -> dict[str, Any]:
    return {"model": body["model"], **question} if "model" in body else question


def _asking_for_texts(body: dict[str, Any], ids: list[int], spans: list[tuple[int, int]]) -> dict[str, Any]:
    """The question for the texts of spans of ids: each of what is before it, and of both."""
    tokens = []
    for start, end in spans:
        context = max(0, start - _CONTEXT_TOKENS)
        tokens += [ids[context:start], ids[context:end]]
    return _named(body, {"tokens": tokens, "skip_special_tokens": body.get("skip_special_tokens", True)})


def _texts(answer: Any) -> list[str]:
    """The texts asked for; one that does not go on from what is before it is none."""
    told = answer.get("text") if isinstance(answer, dict) else None
    if not isinstance(told, list) or not all(isinstance(text, str) for text in told):
        return []
    pairs = zip(told[::2], told[1::2], strict=False)
    return [both[len(before) :] if both.startswith(before) else "\0" for before, both in pairs]


def _text_of(event: bytes) -> str:
    choices = parsed(event).get("choices")
    return str(choices[0].get("text") or "") if choices else ""


def _reason(event: bytes) -> Any:
    meta = parsed(event).get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    return reason.get("type") if isinstance(reason, dict) else reason
