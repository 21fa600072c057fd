"""Reads requests: what is asked for, of which model, and how it may be handled."""

from __future__ import annotations

import re
from typing import Any, final

import orjson

from .engines import EngineRegistry
from .errors import RequestError
from .guard import is_control_route
from .handoff import INTERNAL_FIELDS, without_internal
from .http1 import Request
from .openapi import JSON_ROUTES
from .slo_classes import SloClass
from .stream_tape import is_resumable
from .text_chain import Prompt, read_prompt

_NEVER = (b"TRACE", b"CONNECT")  # they would tell what only the engine should see
# The model in a multipart form (audio, images).
_FORM_MODEL = re.compile(rb'name="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,256})\r\n')


_SESSION_HEADER = re.compile(rb"^x-session-id:[ \t]*([^\r\n]{1,256})", re.IGNORECASE | re.MULTILINE)


@final
class Asked:
    """A request as it goes to an engine, its prompt, and whether its stream can go on tape."""

    __slots__ = ("prompt", "request", "tapeable")

    def __init__(self, request: Request, prompt: Prompt | None = None, tapeable: bool = False) -> None:
        self.request = request
        self.prompt = prompt if prompt is not None else Prompt()
        self.tapeable = tapeable


class Intake:
    """Turns requests into what exchanges carry."""

    def __init__(self, registry: EngineRegistry) -> None:
        self._registry = registry
        self.aliases: dict[str, str] = {}
        self.resume_streams = True
        self.pass_control_routes = False
        self.read_sessions = False
        self.slo_classes: dict[str, SloClass] = {}
        self.explains_all = False

    def read(self, path: str, request: Request) -> Asked:
        """Raises RequestError for what no engine should see."""
        method = request.head.method
        if method != b"POST" or path not in JSON_ROUTES:
            if method in _NEVER or (path in JSON_ROUTES and method != b"OPTIONS"):
                raise RequestError(405, "method_not_allowed", f"{path} does not answer {method.decode('latin-1')}")
            if is_control_route(path) and not self.pass_control_routes:
                message = "this route controls an engine; call the engine itself (or see --engine-control-routes)"
                raise RequestError(403, "control_route", message)
            return self._other(request)
        try:
            body = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            raise RequestError(400, "invalid_json", f"the request body is not valid JSON: {error}") from None
        if not isinstance(body, dict):
            raise RequestError(400, "invalid_json", "the request body must be a JSON object")
        model = body.get("model", "")
        if not isinstance(model, str):
            raise RequestError(400, "invalid_model", "`model` must be a string")
        if not INTERNAL_FIELDS.isdisjoint(body) or model in self.aliases:
            body = without_internal(body)
            if model in self.aliases:
                body["model"] = self.aliases[model]
            request = Request(request.head, _dumped(body))
        tapeable = False
        if "stream" in body and self.resume_streams and request.head.minor_version:
            tapeable = is_resumable(path, body)
        try:
            prompt = read_prompt(body, self._registry.loras)
        except (TypeError, RecursionError):
            return Asked(request, Prompt(body.get("model") or ""))  # deeper than we render: placed by load alone
        prompt.asked_model = model
        if self.read_sessions:
            prompt.session = _session(request, body)
        if self.slo_classes:  # the operator's word about order, in the place of the client's
            if isinstance(tier := body.get("service_tier"), str) and tier in self.slo_classes:
                prompt.slo, prompt.priority = self.slo_classes[tier], self.slo_classes[tier].priority
        elif "priority" in body and type(body["priority"]) is int:
            prompt.priority = body["priority"]
        if self.explains_all or request.head.wants_route:
            prompt.explained = True
        return Asked(request, prompt, tapeable)

    def _other(self, request: Request) -> Asked:
        """A route that is not ours to understand: it goes to an engine of the model that it names, if it does."""
        body = request.body
        if not body:
            return Asked(request)
        if body[:1] == b"{":
            try:
                named = orjson.loads(body).get("model")
            except orjson.JSONDecodeError:
                return Asked(request)
            if not isinstance(named, str):
                return Asked(request)
            prompt = Prompt(self.aliases.get(named, named))
            if named in self.aliases:
                prompt.asked_model = named
                request = Request(request.head, _dumped({**orjson.loads(body), "model": prompt.model}))
            return Asked(request, prompt)
        field = _FORM_MODEL.search(body) if b'name="model"' in body else None
        return Asked(request, Prompt(field[1].decode("utf-8", "replace")) if field is not None else Prompt())


def _dumped(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        message = "the request body is nested too deeply to be passed on under another model name or without a field"
        raise RequestError(400, "invalid_json", message) from None


def asks_for_stream(body: bytes) -> bool:
    """Of a request that was read before, off the hot path."""
    return b'"stream"' in body and orjson.loads(body).get("stream") is True


def _session(request: Request, body: dict[str, Any]) -> str:
    """The session a request says it belongs to."""
    named = _SESSION_HEADER.search(request.head.passing)
    if named is not None:
        return named[1].strip().decode("latin-1")
    value = body.get("session_id") or body.get("prompt_cache_key")
    return value[:256] if isinstance(value, str) else ""
