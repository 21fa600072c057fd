"""Watches engines: probes their health, learns their models, finds their KV events, and moves their
states.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
import zmq

from . import dialects
from .breaker import Circuit
from .config import Timeouts
from .engines import Engine, EngineRegistry, Health
from .event_feed import EventFeed
from .handoff import PARAMS
from .hints import TELL_PEER
from .knowledge import Knowledge
from .metrics import Metrics
from .tokens import TokenLearner

_MAX_BACKOFF = 4  # probe intervals
_FAILURES_UNTIL_DOWN = 3
_REFRESH_PROBES = 5  # models may come and go (LoRA adapters)
_TELL_SLOW_SECONDS = 600.0
_NAME_PATH = "/v1/completions"
_NO_SUCH_ROUTE = (400, 404, 405, 422, 501)
_AT_ONCE = frozenset(("connect_failed", "connect_timeout"))
log = logging.getLogger("dynamo_proxy")


class EngineWatch:
    """One engine's probe loop and event feeds."""

    def __init__(self, engine: Engine, monitor: Monitor) -> None:
        self.engine = engine
        self.feeds: list[EventFeed] = []
        self.wake = asyncio.Event()
        self.looked = asyncio.Event()  # the first probe is over
        self._monitor = monitor
        self._sources: tuple[dialects.EventSource, ...] = ()
        self._failures = 0
        self._failing_since = 0.0
        self._probes = 0
        self.tripped = False  # and nobody was told that it is over
        self._asking: asyncio.Task[None] | None = None  # the engine for its name among peers
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        interval = self._monitor.timeouts.probe_interval_seconds
        while True:
            reason = await self._monitor.probe(self.engine)
            if reason:
                self._failed(reason)
            else:
                await self._passed()
            self.looked.set()
            down = self.engine.health is not Health.READY
            pause = interval * min(max(1, self._failures), _MAX_BACKOFF) if down else interval
            self.wake.clear()
            try:
                await asyncio.wait_for(self.wake.wait(), pause)
            except asyncio.TimeoutError:
                continue

    def _failed(self, reason: str) -> None:
        engine = self.engine
        self._failures += 1
        self._monitor.metrics.probes.labels(engine.name, reason).inc()
        now, grace = self._monitor.clock(), self._monitor.timeouts.start_grace_seconds
        if self._failures == 1:
            self._failing_since = now
            if engine.health is Health.STARTING:
                log.warning("engine %s is not reachable yet (%s); probing until it is", engine.address.url, reason)
        if engine.health is Health.STARTING and now - self._failing_since >= grace:
            log.warning("engine %s is down: never ready in %g s (%s); probing on", engine.address.url, grace, reason)
            engine.health = Health.DOWN
        if engine.health is Health.READY and (reason == "connect_failed" or self._failures >= _FAILURES_UNTIL_DOWN):
            self.down(reason)

    def down(self, reason: str) -> None:
        """Out of the ready set until a probe passes again."""
        if self.engine.health is Health.READY:
            log.warning("engine %s is down (%s); probing until it is back", self.engine.address.url, reason)
            self.engine.health = Health.DOWN

    async def _passed(self) -> None:
        engine = self.engine
        self._failures = 0
        self._probes += 1
        engine.breaker.tick(asyncio.get_running_loop().time())
        if engine.health is Health.READY:
            if self.tripped and engine.breaker.state is Circuit.CLOSED:
                self.tripped = False
                log.info("engine %s answers its requests: it gets them again", engine.address.url)
            if self._probes % _REFRESH_PROBES == 0:
                await self._monitor.read_models(engine)
                self._ask_name()
            return
        back = engine.health is Health.DOWN
        await self._monitor.read_models(engine)
        if back:
            self._monitor.knowledge.approx.forget_nodes(engine.slot)
        engine.peer_name = None
        await self._find_events()
        self._ask_name()
        self._monitor.tokens.engine_changed(engine.slot)
        engine.breaker.reset()
        self.tripped = False
        self._monitor.registry.became_ready(engine, asyncio.get_running_loop().time())
        log.info("engine %s is ready (%s knowledge)", engine.address.url, engine.knowledge)

    def _ask_name(self) -> None:
        """In the background: a busy engine lets a request wait."""
        engine = self.engine
        if engine.runs_connector and engine.peer_name is None and (self._asking is None or self._asking.done()):
            self._asking = asyncio.get_running_loop().create_task(self._monitor.ask_name(engine))

    async def _find_events(self) -> None:
        monitor, engine = self._monitor, self.engine
        sources, capacity = await monitor.discover(engine)
        if capacity is not None:
            monitor.knowledge.set_capacity_tokens(engine.slot, capacity)
        if sources == self._sources:
            return  # the old subscriptions still fit: a restart shows in their sequence numbers
        self.close_feeds()
        self._sources = sources
        for source in sources:
            feed = EventFeed(engine.slot, source, monitor.knowledge, monitor.metrics)
            feed.on_change = self._knowledge_changed
            try:
                feed.start(monitor.zmq_context(), monitor.timeouts.replay_seconds)
            except zmq.ZMQError as error:
                feed.close()
                monitor.metrics.event_gaps.labels("bad_endpoint").inc()
                log.warning("KV events of %s: cannot use %s (%s)", engine.address.url, source.endpoint, error)
                continue
            self.feeds.append(feed)
        self._knowledge_changed()

    def _knowledge_changed(self) -> None:
        engine, knowledge, bit = self.engine, self._monitor.knowledge, 1 << self.engine.slot
        before = engine.knowledge
        engine.event_feeds = len(self.feeds)
        engine.events_lost = any(feed.lost for feed in self.feeds)
        engine.events_complete = bool(self.feeds) and all(feed.complete for feed in self.feeds)
        knowledge.event_mask = knowledge.event_mask | bit if self.feeds else knowledge.event_mask & ~bit
        knowledge.exact_mask = knowledge.exact_mask | bit if engine.events_complete else knowledge.exact_mask & ~bit
        if engine.knowledge != before:
            log.info("engine %s: KV knowledge is now %s", engine.address.url, engine.knowledge)

    def close_feeds(self) -> None:
        for feed in self.feeds:
            feed.close()
            self._monitor.knowledge.exact.clear_source(self.engine.slot, feed.source.rank)
        self.feeds = []
        self._sources = ()
        self._knowledge_changed()

    async def close(self) -> None:
        tasks = [task for task in (self.task, self._asking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.close_feeds()

    def check(self) -> None:
        for feed in self.feeds:
            feed.check()
        if self.task.done() and not self.task.cancelled():
            raise AssertionError(f"the watch of {self.engine.name} died: {self.task.exception()!r}")
        if self._asking is not None and self._asking.done() and not self._asking.cancelled():
            assert self._asking.exception() is None, f"asking {self.engine.name} for its name failed"


class Monitor:
    """All watches, and the control-plane calls they make."""

    def __init__(
        self,
        registry: EngineRegistry,
        knowledge: Knowledge,
        metrics: Metrics,
        tokens: TokenLearner,
        timeouts: Timeouts,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.registry = registry
        self.knowledge = knowledge
        self.metrics = metrics
        self.tokens = tokens
        self.timeouts = timeouts
        self.clock = clock or asyncio.get_running_loop().time  # by which engines have time to start
        self.use_events = True
        self.watches: dict[int, EngineWatch] = {}
        self._slow_told: dict[int, float] = {}  # when it was said of an engine that it is slow
        self._session: aiohttp.ClientSession | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    def start(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    def watch(self, engine: Engine) -> None:
        self.watches[engine.slot] = EngineWatch(engine, self)

    async def first_looks(self, seconds: float) -> None:
        """Wait until every engine was probed once, but not longer than this."""
        looks = [asyncio.ensure_future(watch.looked.wait()) for watch in self.watches.values()]
        if looks:
            _, slow = await asyncio.wait(looks, timeout=seconds)
            for look in slow:
                look.cancel()

    async def unwatch(self, engine: Engine) -> None:
        self._slow_told.pop(engine.slot, None)
        watch = self.watches.pop(engine.slot, None)
        if watch is not None:
            await watch.close()

    def request_failed(self, engine: Engine, reason: str) -> None:
        """A request failed on an engine: one that refuses connections is down at once, others are looked
        at.
        """
        watch = self.watches.get(engine.slot)
        if watch is None:
            return
        if engine.breaker.failed(asyncio.get_running_loop().time()):
            self.metrics.trips.labels(engine.name, reason).inc()
            log.warning("engine %s fails its requests (%s): it gets none for a while", engine.address.url, reason)
            watch.tripped = True
        if reason in _AT_ONCE:
            watch.down(reason)
        if not reason.startswith("status_"):
            watch.wake.set()

    def engine_is_slow(self, engine: Engine) -> None:
        """An engine is far slower than the others: it gets nothing for a while, then one request as a trial. One that
        always is (a slower kind among others) gets pauses for ever: that is said once in a while.
        """
        engine.breaker.trip(asyncio.get_running_loop().time())
        self.metrics.trips.labels(engine.name, "slow").inc()
        now, url = self.clock(), engine.address.url
        if now - self._slow_told.get(engine.slot, -_TELL_SLOW_SECONDS) >= _TELL_SLOW_SECONDS:
            self._slow_told[engine.slot] = now
            log.warning("engine %s is far slower than the others: it gets no requests for a while, now and again", url)

    def zmq_context(self) -> zmq.Context[zmq.Socket[bytes]]:
        if self._context is None:
            self._context = zmq.Context()
        return self._context

    async def close(self) -> None:
        for watch in list(self.watches.values()):
            await watch.close()
        self.watches.clear()
        if self._context is not None:
            self._context.term()
            self._context = None

    # --- control-plane calls

    async def probe(self, engine: Engine) -> str:
        """Empty if the engine is healthy, else why not."""
        status, _, reason = await self._get(engine, "/health")
        if reason:
            return reason
        return "" if status == 200 else f"status_{status}"

    async def read_models(self, engine: Engine) -> None:
        status, body, _ = await self._get(engine, "/v1/models")
        if status == 200:
            engine.models = dialects.read_models(_json(body))
            self.registry.models_changed()

    async def discover(self, engine: Engine) -> tuple[tuple[dialects.EventSource, ...], int | None]:
        """KV event sources and KV capacity in tokens, as far as the engine tells."""
        host = engine.address.host
        status, body, _ = await self._get(engine, dialects.VLLM_SOURCES_PATH)
        sources = dialects.vllm_sources(_json(body), host) if status == 200 else ()
        capacity: int | None = None
        if status != 200:
            info_status, info, _ = await self._get(engine, dialects.SGLANG_INFO_PATH)
            if info_status == 200:
                sources = dialects.sglang_sources(_json(info), host)
                capacity = dialects.sglang_capacity_tokens(_json(info))
                engine.bootstrap_port = dialects.sglang_bootstrap_port(_json(info))
        engine.runs_connector = False
        if capacity is None:
            status, body, _ = await self._get(engine, "/metrics")
            text = body.decode("utf-8", "replace") if status == 200 else ""
            capacity = dialects.vllm_capacity_tokens(text)
            is_vllm = engine.models is not None and engine.models.kind == "vllm"
            engine.runs_connector = is_vllm and dialects.runs_connector(text)
        return (sources if self.use_events else ()), capacity

    async def ask_name(self, engine: Engine) -> None:
        """By which name its peers may read an engine's host memory: any answer of it tells."""
        assert self._session is not None
        models = engine.models
        ids = sorted(models.ids - models.loras) if models is not None else []
        body = {"model": ids[0] if ids else "", "prompt": [1], "max_tokens": 1, PARAMS: {TELL_PEER: True}}
        timeout = aiohttp.ClientTimeout(total=self.timeouts.first_byte_seconds)
        try:
            async with self._session.post(engine.address.url + _NAME_PATH, json=body, timeout=timeout) as answer:
                text = await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return  # asked again later
        if answer.status == 200:
            engine.peer_name = dialects.peer_name(_json(text))
        elif answer.status in _NO_SUCH_ROUTE:
            engine.peer_name = ""

    async def _get(self, engine: Engine, path: str) -> tuple[int, bytes, str]:
        """(status, body, "") or (0, empty, why it failed)."""
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=self.timeouts.probe_timeout_seconds)
        try:
            async with self._session.get(engine.address.url + path, timeout=timeout) as answer:
                return answer.status, await answer.read(), ""
        except asyncio.TimeoutError:
            return 0, b"", "timeout"
        except aiohttp.ClientConnectorError:
            return 0, b"", "connect_failed"
        except (aiohttp.ClientError, OSError, ValueError):
            return 0, b"", "bad_answer"

    def check(self) -> None:
        for slot, watch in self.watches.items():
            assert watch.engine.slot == slot, f"watch of slot {watch.engine.slot} filed under {slot}"
            watch.check()


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
