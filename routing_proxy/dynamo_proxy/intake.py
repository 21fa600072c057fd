"""Reads requests: what is asked for, of which model, and how it may be handled."""

from __future__ import annotations

from typing import NamedTuple

import orjson

from .engines import EngineRegistry
from .errors import RequestError
from .guard import INTERNAL_FIELDS, is_control_route, without_internal
from .http1 import Request
from .openapi import JSON_ROUTES
from .stream_tape import is_resumable
from .text_chain import Prompt, read_prompt


class Asked(NamedTuple):
    """A request as it goes to an engine, its prompt, and whether its stream can go on tape."""

    request: Request
    prompt: Prompt = Prompt()
    tapeable: bool = False


class Intake:
    """Turns requests into what exchanges carry."""

    def __init__(self, registry: EngineRegistry) -> None:
        self._registry = registry
        self.resume_streams = True
        self.pass_control_routes = False

    def read(self, path: str, request: Request) -> Asked:
        """Raises RequestError for what no engine should see."""
        if request.head.method != b"POST" or path not in JSON_ROUTES:
            if is_control_route(path) and not self.pass_control_routes:
                message = "this route controls an engine; call the engine itself (or see --engine-control-routes)"
                raise RequestError(403, "control_route", message)
            return Asked(request)
        try:
            body = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            raise RequestError(400, "invalid_json", f"the request body is not valid JSON: {error}") from None
        if not isinstance(body, dict):
            raise RequestError(400, "invalid_json", "the request body must be a JSON object")
        if "model" in body and not isinstance(body["model"], str):
            raise RequestError(400, "invalid_model", "`model` must be a string")
        if not INTERNAL_FIELDS.isdisjoint(body):
            body = without_internal(body)
            request = request._replace(body=orjson.dumps(body))
        tapeable = False
        if "stream" in body and self.resume_streams and request.head.minor_version:
            tapeable = is_resumable(path, body)
        try:
            return Asked(request, read_prompt(body, self._registry.loras), tapeable)
        except (TypeError, RecursionError):
            return Asked(request, Prompt(body.get("model") or ""))  # deeper than we render: placed by load alone
