"""The bytes of heads and errors that the proxy itself writes."""

from __future__ import annotations

import orjson

from .http_heads import RequestHead, ResponseHead
from .router import Placement, Standing

_NOT_READY: dict[Standing, str] = {
    "no_engine": "no engine is ready to take this request; try again in a few seconds, GET /health tells their states",
    "not_now": "no engine that serves the model `{model}` takes requests now; try again in a few seconds",
    "not_told": "no ready engine serves the model `{model}`, but an engine that has not told its models yet may: try "
    "again in a few seconds, or check the name (GET /v1/models lists what is served now)",
}
_LATE = frozenset(("first_byte_timeout", "connect_timeout"))


def request_bytes(head: RequestHead, target: bytes, body: bytes, host_lines: bytes) -> bytes:
    """The request as an engine gets it: one length, our Host, no hop-by-hop headers."""
    has_body = body or head.chunked or head.method in (b"POST", b"PUT", b"PATCH")
    length = b"content-length: %d\r\n" % len(body) if has_body else b""
    return b"%b %b HTTP/1.1\r\n%b%b%b\r\n%b" % (
        head.method, target, host_lines, head.passing, length, body,
    )  # fmt: skip


def response_bytes(head: ResponseHead, request: RequestHead, placement: Placement, receipt: bytes) -> bytes:
    """The response head as the client gets it."""
    ours = b""
    if head.chunked and request.minor_version:
        ours = b"transfer-encoding: chunked\r\n"
    framed = head.content_length is not None or ours
    if not (framed and request.keep_alive):
        ours += b"connection: close\r\n"
    elif request.minor_version == 0:
        ours += b"connection: keep-alive\r\n"
    ours += receipt
    if head.location:  # made of the Host that we sent: the engine's address is nobody's business
        at_engine = head.location.startswith(placement.engine.root_url)
        ours += b"location: %b\r\n" % (
            head.location[len(placement.engine.root_url) - 1 :] if at_engine else head.location
        )
    return b"HTTP/1.1 %d %b\r\n%b%bx-dynamo-engine: %b\r\nx-dynamo-matched-tokens: %d\r\n\r\n" % (
        head.status, head.reason, head.passing, ours, placement.engine.label, placement.decision.matched_tokens,
    )  # fmt: skip


def whole_response_bytes(
    head: ResponseHead, request: RequestHead, placement: Placement, body: bytes, receipt: bytes
) -> bytes:
    """A whole answer as the client gets it; `body` is decoded."""
    if head.content_length is None:
        head = head.sized(head.passing + b"content-length: %d\r\n" % len(body), len(body))
    return response_bytes(head, request, placement, receipt) + body


def is_framed(head: ResponseHead, request: RequestHead) -> bool:
    """True if the client can tell a whole answer from a cut one (a 1.0 client gets chunks decoded)."""
    return head.content_length is not None or (head.chunked and request.minor_version == 1)


def may_speak(head: ResponseHead, request: RequestHead, tail: bytes) -> bool:
    """True if an in-band error event fits behind `tail`: in an event stream, between two events and two chunks."""
    return head.is_events and head.chunked and is_framed(head, request) and tail.endswith(b"\n\n\r\n")


def refusal(failure: str, model: str, standing: Standing) -> tuple[int, str, str]:
    """(status, code, message) for a request that no engine answered: `failure` says how the last one tried failed; if
    none was tried, `standing` says why.
    """
    if failure == "no_prefill_engine":
        message = "no prefill engine is ready, and decode engines cannot serve this alone; try again in a few seconds"
        return 503, failure, message
    if failure:
        status, code = (504, "engine_timeout") if failure in _LATE else (502, "engine_failed")
        return status, code, f"every engine that could serve this request failed ({failure}); try again"
    if standing == "unknown":
        message = f"The model `{model}` does not exist here; GET /v1/models lists what is served."
        return 404, "model_not_found", message
    return 503, "no_engine_ready", _NOT_READY[standing].format(model=model)


def stream_error_bytes(message: str) -> bytes:
    """An error event and the end of the stream, in chunks."""
    error = {"error": {"message": message, "type": "engine_error", "code": "engine_lost"}}
    event = b"data: " + orjson.dumps(error) + b"\n\n"
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
