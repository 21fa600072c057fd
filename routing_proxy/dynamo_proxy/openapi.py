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


def document() -> dict[str, Any]:
    """The document as a JSON-ready dict."""
    paths: dict[str, Any] = {
        "/v1/models": {"get": _operation("Models of all ready engines, each id once", "application/json")},
        "/health": {
            "get": {
                **_operation("State of the proxy and of each engine", "application/json"),
                "responses": {
                    "200": _content("At least one engine is ready", "application/json"),
                    "503": _content("No engine is ready", "application/json"),
                },
            }
        },
        "/metrics": {"get": _operation("Prometheus metrics of the proxy", "text/plain")},
        "/openapi.json": {"get": _operation("This document", "application/json")},
    }
    for route, summary in JSON_ROUTES.items():
        paths[route] = {"post": _passed_through(summary)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dynamo-proxy",
            "version": "0.1.0",
            "description": "Routes not listed here are passed to an engine unchanged.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": _error_schema()}},
    }


def _operation(summary: str, media_type: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": _content(summary, media_type)}}


def _content(description: str, media_type: str) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {}}}


def _passed_through(summary: str) -> dict[str, Any]:
    def error(description: str) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": _ERROR}}}

    return {
        "summary": f"{summary} (answered by an engine; its fields are the engine's)",
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
        "responses": {
            "200": {
                "description": "The engine's answer, untouched",
                "headers": {
                    "x-dynamo-engine": {"description": "Which engine answered", "schema": {"type": "string"}},
                    "x-dynamo-matched-tokens": {
                        "description": "Prompt tokens predicted to be in its cache",
                        "schema": {"type": "integer"},
                    },
                },
                "content": {"application/json": {}, "text/event-stream": {}},
            },
            "400": error("The body is not a JSON object"),
            "404": error("No engine serves this model"),
            "413": error("The body is too large"),
            "502": error("Every engine failed before answering"),
            "503": error("No engine is ready; Retry-After says when to try again"),
            "504": error("No engine answered in time"),
        },
    }


def _error_schema() -> dict[str, Any]:
    fields = {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type"], "properties": fields}},
    }
