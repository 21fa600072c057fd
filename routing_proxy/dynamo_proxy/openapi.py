"""The OpenAPI document: true for the proxy's own routes, and naming the engine routes that pass through."""

from __future__ import annotations

from typing import Any

# POST routes whose body must be a JSON object; their prompt decides the engine.
JSON_ROUTES = {
    "/v1/chat/completions": "Chat completion",
    "/v1/completions": "Text completion",
    "/v1/embeddings": "Embeddings",
    "/v1/responses": "Responses API",
    "/v1/messages": "Anthropic messages",
    "/v1/rerank": "Rerank",
    "/v1/score": "Score",
    "/v1/classify": "Classify",
    "/generate": "SGLang's native generation",
    "/tokenize": "Tokenise a prompt",
    "/detokenize": "Text of token ids",
}

_ERROR = {"$ref": "#/components/schemas/Error"}
_REQUEST = {"type": "object", "properties": {"model": {"type": "string"}}}
_MODEL = {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}}
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}
_HEALTH = {
    "type": "object",
    "required": ["status", "engines"],
    "properties": {
        "status": {"enum": ["ready", "draining", "no engine ready"]},
        "engines": {"type": "array", "items": {"type": "object", "required": ["engine", "state", "knowledge"]}},
    },
}


def document(with_keys: bool = False) -> dict[str, Any]:
    """The document as a JSON-ready dict; `with_keys` if callers need an API key."""
    health = {
        "200": _content("At least one engine is ready", "application/json", {"$ref": "#/components/schemas/Health"}),
        "503": _content("No engine is ready", "application/json", {"$ref": "#/components/schemas/Health"}),
        "405": _error("Anything but GET and HEAD"),
    }
    one = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths: dict[str, Any] = {
        "/v1/models": {"get": _operation("Models of all ready engines and aliases, each id once", _MODELS)},
        "/v1/models/{id}": {
            "get": {
                **_operation("One model; its id may hold slashes", _MODEL),
                "parameters": [one],
            }
        },
        "/health": {"get": {"summary": "State of the proxy and of each engine", "responses": health, "security": []}},
        "/metrics": {"get": _operation("Prometheus metrics of the proxy", {"type": "string"}, "text/plain")},
        "/openapi.json": {"get": _operation("This document", {"type": "object"})},
    }
    paths["/v1/models/{id}"]["get"]["responses"]["404"] = _error("No engine serves this model")
    for route, summary in JSON_ROUTES.items():
        paths[route] = {"post": _passed_through(summary)}
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    components: dict[str, Any] = {"schemas": {"Error": _error_schema(), "Health": _HEALTH}}
    said: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "dynamo-proxy",
            "version": "0.1.0",
            "description": "Routes not listed here are passed to an engine unchanged.",
        },
        "paths": paths,
        "components": components,
    }
    if with_keys:
        components["securitySchemes"] = schemes
        said["security"] = [{name: []} for name in schemes]
    return said


def _operation(summary: str, schema: dict[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    responses = {
        "200": _content(summary, media_type, schema),
        "401": _error("No API key, or an unknown one (only where keys are asked for)"),
        "405": _error("Anything but GET and HEAD"),
    }
    return {"summary": summary, "responses": responses}


def _content(description: str, media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _error(description: str) -> dict[str, Any]:
    return _content(description, "application/json", _ERROR)


def _passed_through(summary: str) -> dict[str, Any]:
    told = {"x-dynamo-engine": ("string", "Which engine answered")}
    told["x-dynamo-matched-tokens"] = ("integer", "Prompt tokens predicted to be in its cache")
    told["x-dynamo-route"] = ("string", "Why, as JSON, if the request asked for it with a header of this name")
    headers = {name: {"description": text, "schema": {"type": kind}} for name, (kind, text) in told.items()}
    answer: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    return {
        "summary": f"{summary} (answered by an engine; its fields are the engine's)",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _REQUEST}}},
        "responses": {
            "200": {"description": "The engine's answer, untouched", "headers": headers, "content": answer},
            "400": _error("The body is not a JSON object, or `model` is not a string"),
            "401": _error("No API key, or an unknown one (only where keys are asked for)"),
            "404": _error("No engine serves this model"),
            "405": _error("Anything but POST and OPTIONS"),
            "413": _error("The body is too large"),
            "429": _error("The limits of this API key, or of the fleet, are used up; Retry-After says for how long"),
            "502": _error("Every engine failed before answering"),
            "503": _error("No engine is ready; Retry-After says when to try again"),
            "504": _error("No engine answered in time"),
            "default": {"description": "What else the engine says, untouched"},
        },
    }


def _error_schema() -> dict[str, Any]:
    fields = {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type"], "properties": fields}},
    }
