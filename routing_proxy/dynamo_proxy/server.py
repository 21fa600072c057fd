"""Puts the parts together: listeners, engines, shutdown. `serve` is the whole life of one proxy."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import aiohttp
from aiohttp import web

from .access_log import LogFile, RequestLog, Sink
from .admin import AdminRoutes
from .api_keys import KeyRing
from .client_connection import ClientConnection
from .config import EngineAddress, ProxyConfig
from .discovery import Discovery
from .engines import Engine, EngineRegistry
from .front_end import FrontEnd
from .guard import Guard
from .health import Monitor
from .knowledge import Knowledge
from .ledger import Ledger
from .listening import banner_host, listen_error
from .metrics import Metrics
from .policy import OverlapRule, PrefillRule, TierWeights
from .replicas import ReplicaSync
from .router import Router, RoutingState
from .services import Services
from .sessions import Sessions
from .spans import SpanSink
from .supervisor_page import SupervisorPage
from .tls import ServerTls, client_context
from .tokens import TokenLearner
from .upstream import UpstreamPool
from .waiting_room import WaitingRoom

_BACKLOG = 4096
_FIRST_LOOKS_SECONDS = 3.0
log = logging.getLogger("dynamo_proxy")


class ProxyServer:
    """One running proxy. Make it inside a running loop, `start` it, `drain` and `close` it."""

    def __init__(
        self, config: ProxyConfig, rng: Random | None = None, clock: Callable[[], float] | None = None
    ) -> None:
        self.config = config
        self.metrics = Metrics()
        self.ledger = Ledger()
        self.knowledge = Knowledge(config.kv_block_tokens)
        self.registry = EngineRegistry(self.ledger)
        self.router = Router(self.registry, self.ledger, self.knowledge, self.metrics, rng or Random())
        self.router.state = routing_state(config)
        routing = config.routing
        self.knowledge.weights = TierWeights(
            routing.host_hit_weight, routing.disk_hit_weight, routing.object_hit_weight
        )
        self.tokens = TokenLearner(self.knowledge, self.metrics)
        self.monitor = Monitor(self.registry, self.knowledge, self.metrics, self.tokens, config.timeouts, clock)
        self.monitor.use_events = config.use_kv_events
        self.router.when_failed(self.monitor.request_failed)
        self.router.when_slow(self.monitor.engine_is_slow)
        self.request_log = _request_log(config)
        parts = self.router, self.metrics, self.tokens
        late = config.routing.prefill_seconds
        services = Services(*parts, config.limits, config.timeouts, self.request_log, late)
        self.front_end = FrontEnd(self.registry, self.ledger, self.knowledge, services)
        self.front_end.intake.resume_streams = config.resume_streams
        self.front_end.intake.pass_control_routes = config.control_routes
        if config.supervisor_socket:
            self.front_end.page = SupervisorPage(config.supervisor_socket)
        self.guard: Guard | None = None
        if config.api_keys_path:
            classes, now = [each.name for each in routing.slo_classes], asyncio.get_running_loop().time()
            self.guard = Guard(KeyRing(Path(config.api_keys_path), now, classes))
        self.front_end.guard = self.guard
        self.front_end.strip_credentials = bool(config.engine_api_key)
        if routing.engine_request_limit:
            room = WaitingRoom(self.router.has_room, routing.queue_size, routing.queue_seconds)
            self.front_end.waiting = room
            self.router.when_room(room.wake)
        self.front_end.intake.read_sessions = bool(routing.session_seconds)
        self.front_end.intake.slo_classes = {found.name: found for found in routing.slo_classes}
        self.front_end.intake.aliases = dict(config.aliases)
        self.front_end.intake.explains_all = self.request_log is not None
        files = config.tls
        self._engine_tls = client_context(files.engine_ca_file)
        self.tls = ServerTls(files.cert_file, files.key_file) if files.cert_file else None
        self.replicas: ReplicaSync | None = None
        if config.replicas is not None:
            self.replicas = ReplicaSync(config.replicas, self.registry, self.ledger, self.knowledge, self.metrics)
            self.replicas.spending = self.guard.spending if self.guard is not None else None
            self.replicas.sessions = self.router.state.sessions
        self.discovery = Discovery(config.discovery, self)
        self.port = 0
        self.admin_port = 0
        self._server: asyncio.Server | None = None
        self._admin: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Open the listeners and begin to probe. Raises ListenError; call `close` even then."""
        config = self.config
        if not config.admin_socket:
            await self._listen()
        if config.admin_port is not None:
            await self._start_admin(config.admin_host, config.admin_port)
        key = config.engine_api_key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._engine_tls, limit=0),
            headers={"authorization": f"Bearer {key}"} if key else None,
        )
        for part in (self.tls, self.request_log):
            if part is not None:
                part.start()
        self.monitor.start(self._session)
        self.tokens.start(self._session)
        if self.replicas is not None:
            self.replicas.start()
        if self.guard is not None:
            self.guard.start()
        for address in config.engines:
            self.add_engine(address)
        await self.discovery.start()
        if config.admin_socket:  # a worker: others serve the port until this one knows its engines
            await self._start_worker_admin(config.admin_socket)
            await self.monitor.first_looks(_FIRST_LOOKS_SECONDS)
            await self._listen()

    async def _listen(self) -> None:
        config = self.config
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: ClientConnection(self.front_end, config.limits, config.timeouts),
                config.host,
                config.port,
                backlog=_BACKLOG,
                reuse_port=bool(config.admin_socket) or None,
                ssl=self.tls.context if self.tls is not None else None,
            )
        except OSError as error:
            raise listen_error("--port", config.host, config.port, error) from None
        self.port = self._server.sockets[0].getsockname()[1]

    async def _start_admin(self, host: str, port: int) -> None:
        self._admin = web.AppRunner(AdminRoutes(self).application(), access_log=None)
        await self._admin.setup()
        try:
            await web.TCPSite(self._admin, host, port).start()
        except OSError as error:
            raise listen_error("--admin-port", host, port, error) from None
        self.admin_port = self._admin.addresses[0][1]

    async def _start_worker_admin(self, path: str) -> None:
        self._admin = web.AppRunner(AdminRoutes(self).application(), access_log=None)
        await self._admin.setup()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of the process before
        await web.UnixSite(self._admin, path).start()

    def metrics_page(self) -> bytes:
        return self.front_end.metrics()

    def add_engine(self, address: EngineAddress) -> Engine:
        """The engine at an address, added if it is new."""
        for engine in self.registry:
            if engine.address == address:
                return engine
        timeouts = address.options.applied_to(self.config.timeouts)
        pool = UpstreamPool(address, timeouts, self.config.limits, self._engine_tls)
        key = self.config.engine_api_key
        engine = Engine(self.registry.free_slot(), address, pool, timeouts, credential=key)
        engine.draining = address.options.draining
        self.registry.add(engine)
        self.monitor.watch(engine)
        return engine

    async def remove_engine(self, engine: Engine) -> None:
        """Take an idle engine out. Raises EngineBusyError, or UnknownEngineError if somebody else does it."""
        self.registry.remove(engine)
        try:
            await self.monitor.unwatch(engine)
            await engine.pool.close()
        finally:
            self.knowledge.forget(engine.slot)
            self.router.state.speeds.forget(engine.slot)
            if self.router.state.sessions is not None:
                self.router.state.sessions.forget_slot(engine.slot)
            self.metrics.forget_engine(engine.name)
            self.registry.left(engine)

    async def drain(self, seconds: float) -> bool:
        """Stop accepting and let requests in flight finish. True if all did within `seconds`."""
        self.front_end.draining = True
        if self._server is not None:
            self._server.close()
        for client in list(self.front_end.clients):
            client.close_when_idle()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.front_end.empty.wait(), seconds)
        return not self.front_end.clients

    async def close(self) -> None:
        """Close everything at once."""
        if self._server is not None:
            self._server.close()
        for client in list(self.front_end.clients):
            client.end()
        await self.front_end.empty.wait()
        if self.front_end.waiting is not None:
            self.front_end.waiting.close()
        if self._admin is not None:
            await self._admin.cleanup()
        if self.guard is not None:
            await self.guard.close()
        for part in (self.tls, self.request_log):
            if part is not None:
                await part.close()
        if self.replicas is not None:
            self.replicas.close()
        await self.discovery.close()
        await self.tokens.close()
        await self.monitor.close()
        for engine in self.registry:
            await engine.pool.close()
        if self._session is not None:
            await self._session.close()
        if self._server is not None:
            await self._server.wait_closed()
        await asyncio.sleep(0)  # aborted transports report their end on the next turn

    def check(self) -> None:
        for part in (self.metrics, self.ledger, self.knowledge, self.registry, self.router):
            part.check()
        for part_at_work in (self.tokens, self.monitor, self.front_end, self.discovery):
            part_at_work.check()
        if self.replicas is not None:
            self.replicas.check()


def _request_log(config: ProxyConfig) -> RequestLog | None:
    """Raises ConfigError."""
    sinks: list[Sink] = [LogFile(config.access_log)] if config.access_log else []
    if config.traces_endpoint:
        sinks.append(SpanSink(config.traces_endpoint))
    return RequestLog(*sinks) if sinks else None


def routing_state(config: ProxyConfig) -> RoutingState:
    """The rules that a configuration asks for."""
    state = RoutingState(config.router_mode, temperature=config.routing.temperature)
    state.warm_up_seconds = config.routing.warm_up_seconds
    if config.routing.peer_hit_weight:
        state.learner.expect_of_peers(config.routing.peer_hit_weight)
    state.max_in_flight = config.routing.engine_request_limit
    state.prefill = PrefillRule(config.routing.prefill_min_tokens, config.routing.prefill_max_queued_tokens)
    if config.routing.session_seconds:
        state.sessions = Sessions(config.routing.session_seconds)
    if config.routing.overlap_weight is not None:
        state.overlap = OverlapRule(config.routing.overlap_weight, config.routing.temperature, config.kv_block_tokens)
    return state


async def serve(config: ProxyConfig, on_ready: Callable[[], None] | None = None) -> None:
    """Run until SIGTERM or SIGINT, then drain. A second signal ends it at once. Raises ListenError."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    server = ProxyServer(config)
    try:
        await server.start()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)  # most objects here die by reference count
        if on_ready is None:
            log.info("%s", _banner(server))
        else:
            on_ready()
        await signals.get()
        log.info("stopping: %d requests in flight get %gs", server.ledger.in_flight, config.timeouts.drain_seconds)
        await _drain_or_signal(server, signals)
    finally:
        await server.close()


async def _drain_or_signal(server: ProxyServer, signals: asyncio.Queue[int]) -> None:
    drain = asyncio.ensure_future(server.drain(server.config.timeouts.drain_seconds))
    again = asyncio.ensure_future(signals.get())
    done, _ = await asyncio.wait((drain, again), return_when=asyncio.FIRST_COMPLETED)
    for task in (drain, again):
        task.cancel()
    await asyncio.gather(drain, again, return_exceptions=True)
    if again in done:
        log.warning("second signal: %d requests in flight are cut", server.ledger.in_flight)
    elif not drain.result():
        log.warning("drain time is over: %d requests in flight are cut", server.ledger.in_flight)


def _banner(server: ProxyServer) -> str:
    host = banner_host(server.config.host)
    admin = f", admin http://{server.config.admin_host}:{server.admin_port}" if server.admin_port else ""
    mode = server.router.state.mode
    scheme = "https" if server.tls is not None else "http"
    return f"listening on {scheme}://{host}:{server.port}{admin} (mode {mode}, {len(server.registry)} engines)"
