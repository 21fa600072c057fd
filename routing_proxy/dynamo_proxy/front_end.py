"""Answers requests: the proxy's own routes at once, everything else through an Exchange to an engine."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from urllib.parse import unquote

import orjson

from . import last_resort
from . import metrics as metric_names
from .account import missed
from .client_connection import ClientConnection, Running, error_body
from .engines import EngineRegistry
from .errors import LimitError, ProtocolError, RequestError
from .exchange import Exchange
from .guard import Guard, without_credentials
from .http1 import Request
from .intake import Intake
from .knowledge import Knowledge
from .ledger import Ledger
from .openapi import JSON_ROUTES, document
from .services import Services
from .supervisor_page import SupervisorPage
from .waiting_room import WaitingRoom

_OWN_ROUTES = frozenset(("/v1/models", "/health", "/metrics", "/openapi.json"))
_MODEL_ROUTE = "/v1/models/"
log = logging.getLogger("dynamo_proxy")


class FrontEnd:
    """The requests of all client connections."""

    def __init__(
        self,
        registry: EngineRegistry,
        ledger: Ledger,
        knowledge: Knowledge,
        services: Services,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._knowledge = knowledge
        self._services = services
        self._tallies = services.metrics.tallies
        self.intake = Intake(registry)
        self.guard: Guard | None = None  # None: everybody may call
        self.strip_credentials = False
        self.waiting: WaitingRoom | None = None  # None: engines have no limit
        self.page: SupervisorPage | None = None  # of a worker: the metrics of all workers
        self.clients: set[ClientConnection] = set()
        self.draining = False
        self.empty = asyncio.Event()  # no client is connected
        self.empty.set()

    def opened(self, client: ClientConnection) -> None:
        self.clients.add(client)
        self.empty.clear()

    def closed(self, client: ClientConnection) -> None:
        self.clients.discard(client)
        if not self.clients:
            self.empty.set()

    def rejected(self, error: ProtocolError) -> None:
        self._tallies.finished("none", error.status, error.code, 0.0)

    def handle(self, client: ClientConnection, request: Request) -> Running | None:
        """Start answering one request."""
        path = request.head.path
        if "%" in path:
            path = unquote(path)  # as engines read it
        try:
            return self._admitted(client, request, path)
        except RequestError as error:
            self._tallies.finished(_endpoint(path), error.status, error.code, 0.0)
            wait = error.retry_after_seconds if isinstance(error, LimitError) else 2
            allow = b"POST" if error.status == 405 else b""
            client.refuse(error.status, error.code, str(error), wait_seconds=wait, allow=allow)
        except Exception:
            log.exception(last_resort.TOLD)
            self._services.metrics.internal_errors.inc()
            self._tallies.finished(_endpoint(path), 500, last_resort.CODE, 0.0)
            client.refuse(500, last_resort.CODE, last_resort.MESSAGE)
        return None

    def _admitted(self, client: ClientConnection, request: Request, path: str) -> Running | None:
        method, caller, guard = request.head.method, None, self.guard
        if guard is not None and path != "/health":
            request, caller = guard.admit(request)
        elif self.strip_credentials:
            request = without_credentials(request)
        if path == "/metrics" and self.page is not None and method == b"GET":
            self._tallies.finished(path, 200, "ok", 0.0)
            return self.page.fetch(client)
        own = path in _OWN_ROUTES or path.startswith(_MODEL_ROUTE)
        if own and not (path.startswith("/v1/models") and self._models_are_the_engines()):
            self._own(client, path, method)
            return None
        asked = self.intake.read(path, request)
        meter = None
        if guard is not None and caller is not None:
            try:
                meter = guard.charge(caller, asked.prompt, self._knowledge.prompt_tokens(asked.prompt))
            except LimitError:
                missed(asked, 429, self._services.metrics)
                raise
        exchange = Exchange(client, asked, _endpoint(path), self._services, meter)
        if self.waiting is None:
            exchange.start()
        else:
            self.waiting.enter(exchange, asked.prompt)
        return None if exchange.over else exchange

    # --- own routes

    def _own(self, client: ClientConnection, path: str, method: bytes) -> None:
        status, content_type = 200, b"application/json"
        if method not in (b"GET", b"HEAD"):
            self._tallies.finished(path, 405, "method_not_allowed", 0.0)
            client.refuse(405, "method_not_allowed", f"{path} answers GET only", allow=b"GET, HEAD")
            return
        if path == "/health":
            status, body = self._health()
        elif path == "/v1/models":
            body = orjson.dumps({"object": "list", "data": self.models()})
        elif path.startswith(_MODEL_ROUTE):
            status, body = self._one_model(path[len(_MODEL_ROUTE) :])
        elif path == "/openapi.json":
            body = orjson.dumps(document(with_keys=self.guard is not None))
        else:
            body, content_type = self.metrics(), metric_names.CONTENT_TYPE.encode()
        reason = {200: "ok", 404: "model_not_found"}.get(status, "no_engine_ready")
        self._tallies.finished(_endpoint(path), status, reason, 0.0)
        client.reply(status, body, content_type, b"retry-after: 2\r\n" if status == 503 else b"")

    def _one_model(self, name: str) -> tuple[int, bytes]:
        for entry in self.models():
            if entry["id"] == name:
                return 200, orjson.dumps(entry)
        return 404, error_body(404, "model_not_found", f"The model `{name}` does not exist here.")

    def _health(self) -> tuple[int, bytes]:
        engines = [
            {"engine": engine.name, "state": engine.state, "knowledge": engine.knowledge}
            for engine in self._registry
        ]  # fmt: skip
        ready = self._registry.any_ready() and not self.draining
        state = "draining" if self.draining else "ready" if ready else "no engine ready"
        return 200 if ready else 503, orjson.dumps({"status": state, "engines": engines})

    def models(self) -> list[dict[str, Any]]:
        """The models of all ready engines, each id once."""
        merged: dict[str, dict[str, Any]] = {}
        for engine in self._registry:
            if engine.takes_requests and engine.models is not None:
                for entry in engine.models.entries:
                    merged.setdefault(entry["id"], entry)
        for alias, model in self.intake.aliases.items():
            if model in merged:
                merged.setdefault(alias, {**merged[model], "id": alias, "root": model})
        return list(merged.values())

    def metrics(self) -> bytes:
        rows = []
        for engine in self._registry:
            load = self._ledger.own(engine.slot)
            blocks = self._knowledge.exact.held_blocks(engine.slot)
            rows.append((engine.name, load.in_flight, load.pending_tokens, engine.takes_requests, blocks))
        return self._services.metrics.render(rows)

    def _models_are_the_engines(self) -> bool:
        """True if ready engines would not tell us their models (an API key guards them): let the client
        ask.
        """
        ready = [engine for engine in self._registry if engine.takes_requests]
        return bool(ready) and all(engine.models is None for engine in ready)

    def check(self) -> None:
        assert self.empty.is_set() == (not self.clients), "the empty flag and the clients differ"
        if self.waiting is not None:
            self.waiting.check()
        for client in self.clients:
            client.check()


def _endpoint(path: str) -> str:
    """A metric label of bounded variety."""
    return path if path in JSON_ROUTES or path in _OWN_ROUTES else "other"
