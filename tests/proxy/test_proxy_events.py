"""KV events from real ZMQ publishers: dialects, late joining, gaps, replay, restart; and routing by them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zmq
from dynamo_proxy.server import ProxyServer

from tests.proxy.proxy_fakes import FakeEngine, ask, chat, post, proxy_before, run, wait_until

END = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """A PUB socket and, if wanted, the ROUTER that replays, framed as vLLM 0.32 (or 0.24) does."""

    def __init__(self, replay: bool = True, topic: bytes = b"kv", old_frames: bool = False) -> None:
        self.context = zmq.Context()
        self.pub = self.context.socket(zmq.XPUB)
        self.pub.setsockopt(zmq.LINGER, 0)
        self.port = self.pub.bind_to_random_port("tcp://127.0.0.1")
        self.router = self.context.socket(zmq.ROUTER) if replay else None
        self.replay_port = 0
        if self.router is not None:
            self.router.setsockopt(zmq.LINGER, 0)
            self.replay_port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.topic = topic
        self.old_frames = old_frames
        self.sequence = 0
        self.buffer: list[tuple[int, bytes]] = []
        self.replays: list[int] = []

    def close(self) -> None:
        self.pub.close()
        if self.router is not None:
            self.router.close()
        self.context.term()

    def publish(self, *events: Any, lose: bool = False, keep: bool = True) -> None:
        payload = msgspec.msgpack.encode([1.0, list(events), 0])
        if keep:
            self.buffer.append((self.sequence, payload))
        if not lose:
            self.pub.send_multipart([self.topic, self.sequence.to_bytes(8, "big"), payload])
        self.sequence += 1

    def restart(self) -> None:
        self.sequence = 0
        self.buffer.clear()

    def serve_replay(self) -> None:
        while self.router is not None:
            try:
                client, _, start = self.router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.replays.append(int.from_bytes(start, "big"))
            middle = [b""] if self.old_frames else [b"", self.topic]
            for sequence, payload in self.buffer:
                if sequence >= int.from_bytes(start, "big"):
                    self.router.send_multipart([client, *middle, sequence.to_bytes(8, "big"), payload])
            self.router.send_multipart([client, *([b""] if self.old_frames else [b"", b""]), END, b""])

    async def joined(self) -> None:
        """Wait until the proxy has subscribed, answering replays meanwhile."""
        for _ in range(500):
            self.serve_replay()
            with contextlib.suppress(zmq.Again):
                if self.pub.recv(zmq.NOBLOCK).startswith(b"\x01"):
                    return
            await asyncio.sleep(0.01)
        raise AssertionError("nobody subscribed")

    @property
    def vllm_sources(self) -> dict[str, Any]:
        replay = f"tcp://*:{self.replay_port}" if self.router is not None else None
        settings = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{self.port}"}
        return {"0": {**settings, "replay_endpoint": replay, "topic": self.topic.decode()}}


def stored(first: int, tokens: list[int], parent: int | None = None, size: int = 4) -> dict[str, Any]:
    count = len(tokens) // size
    return {
        "type": "BlockStored", "block_hashes": list(range(first, first + count)), "parent_block_hash": parent,
        "token_ids": tokens[: count * size], "block_size": size,
        "lora_id": None, "medium": "GPU", "lora_name": None,
    }  # fmt: skip


@contextlib.asynccontextmanager
async def fleet(publisher: Publisher, **settings: Any) -> AsyncIterator[tuple[ProxyServer, FakeEngine]]:
    """Two engines; only engine-0 publishes events. Replays are served all the while."""
    first, second = await FakeEngine().start(), await FakeEngine().start()
    first.event_sources = publisher.vllm_sources

    async def serve() -> None:
        while True:
            publisher.serve_replay()
            await asyncio.sleep(0.005)

    server = asyncio.get_running_loop().create_task(serve())
    try:
        async with proxy_before(first, second, **settings) as proxy:
            await publisher.joined()
            try:
                yield proxy, first
            finally:
                server.cancel()
                await asyncio.gather(server, return_exceptions=True)
    finally:
        server.cancel()
        publisher.close()


def knowledge(proxy: ProxyServer) -> str:
    return proxy.registry.at(0).knowledge


def blocks(proxy: ProxyServer) -> int:
    return proxy.knowledge.exact.held_blocks(0)


TOKENS = list(range(1000, 1400))


def completion(tokens: list[int]) -> bytes:
    return post("/v1/completions", {"model": "tiny", "prompt": tokens})


@pytest.mark.parametrize("old_frames", [False, True])
def test_events_before_and_after_joining_make_knowledge_exact_and_routing_follows(old_frames: bool) -> None:
    async def body() -> None:
        publisher = Publisher(old_frames=old_frames)
        publisher.publish(stored(1, TOKENS[:200]))  # before anybody listens
        async with fleet(publisher) as (proxy, _):
            await wait_until(lambda: knowledge(proxy) == "exact")
            assert (publisher.replays, blocks(proxy)) == ([0], 50)
            publisher.publish(stored(51, TOKENS[200:], parent=50))
            await wait_until(lambda: blocks(proxy) == 100)
            answer = await ask(proxy.port, completion(TOKENS))
            assert (answer.headers["x-dynamo-engine"], answer.headers["x-dynamo-matched-tokens"]) == (
                "engine-0",
                "400",
            )
            publisher.publish({"type": "BlockRemoved", "block_hashes": [100], "medium": "GPU"})
            await wait_until(lambda: blocks(proxy) == 99)
            publisher.publish({"type": "AllBlocksCleared"})
            await wait_until(lambda: blocks(proxy) == 0)
            assert knowledge(proxy) == "exact"

    run(body())


def test_a_gap_is_closed_by_the_replay_socket() -> None:
    async def body() -> None:
        publisher = Publisher()
        async with fleet(publisher) as (proxy, _):
            await wait_until(lambda: knowledge(proxy) == "exact")
            publisher.publish(stored(1, TOKENS[:40]))
            publisher.publish(stored(11, TOKENS[40:80], parent=10), lose=True)
            publisher.publish(stored(21, TOKENS[80:120], parent=20))
            publisher.publish(stored(31, TOKENS[120:160], parent=30))
            await wait_until(lambda: blocks(proxy) == 40)
            assert knowledge(proxy) == "exact"
            assert publisher.replays == [0, 1]
            assert b'kv_event_gaps_total{reason="replay"} 1.0' in proxy.front_end.metrics()

    run(body())


@pytest.mark.parametrize("replay", [False, True])
def test_a_gap_that_cannot_be_closed_degrades_and_a_clear_heals(replay: bool) -> None:
    async def body() -> None:
        publisher = Publisher(replay=replay)
        async with fleet(publisher) as (proxy, _):
            publisher.publish(stored(1, TOKENS[:40]))
            await wait_until(lambda: knowledge(proxy) == "exact")
            publisher.publish(stored(11, TOKENS[40:80], parent=10), lose=True, keep=False)
            publisher.publish(stored(21, TOKENS[:80]))
            await wait_until(lambda: knowledge(proxy) == "degraded")
            await wait_until(lambda: blocks(proxy) == 20)
            prompt = "something sent before " * 60
            for _ in range(2):
                answer = await ask(proxy.port, post("/v1/chat/completions", chat(prompt)))
            assert int(answer.headers["x-dynamo-matched-tokens"]) > 100  # the LRU model still routes
            publisher.publish({"type": "AllBlocksCleared"})
            await wait_until(lambda: knowledge(proxy) == "exact")
            assert blocks(proxy) == 0

    run(body())


def test_a_restart_is_seen_by_its_numbers() -> None:
    async def body() -> None:
        publisher = Publisher()
        async with fleet(publisher) as (proxy, _):
            for number in range(5):
                publisher.publish(stored(1 + number, [number] * 4))
            await wait_until(lambda: blocks(proxy) == 5)
            publisher.restart()
            publisher.publish(stored(1, TOKENS[:8]))
            await wait_until(lambda: blocks(proxy) == 2)
            assert knowledge(proxy) == "exact"
            assert b'kv_event_gaps_total{reason="restart"} 1.0' in proxy.front_end.metrics()

    run(body())


def test_joining_late_without_replay_is_approximate_not_exact() -> None:
    async def body() -> None:
        publisher = Publisher(replay=False)
        publisher.publish(stored(1, TOKENS[:40]))
        async with fleet(publisher) as (proxy, _):
            publisher.publish(stored(50, TOKENS[200:240]))
            await wait_until(lambda: blocks(proxy) == 10)
            assert knowledge(proxy) == "approximate"
            assert b'kv_event_gaps_total{reason="late_join"} 1.0' in proxy.front_end.metrics()

    run(body())


def test_unreadable_messages_are_counted_and_degrade() -> None:
    async def body() -> None:
        publisher = Publisher()
        async with fleet(publisher) as (proxy, _):
            publisher.publish(stored(1, TOKENS[:40]))
            await wait_until(lambda: blocks(proxy) == 10)
            publisher.pub.send_multipart([b"kv", b"short", b"x"])
            publisher.publish({"type": "Unheard"})
            publisher.publish(["BlockStored", "nonsense"])
            await wait_until(lambda: knowledge(proxy) == "degraded")
            text = proxy.front_end.metrics()
            for reason in (b"bad_frames", b"unknown_type", b"bad_event"):
                assert b'kv_events_total{reason="%b"} 1.0' % reason in text

    run(body())


def test_sglang_is_discovered_by_its_server_info_and_speaks_arrays() -> None:
    async def body() -> None:
        publisher = Publisher(topic=b"")
        publisher.publish(["BlockStored", [1, 2], None, TOKENS[:8], 4, None, "GPU"])
        engine = await FakeEngine().start()
        engine.server_info = {
            "max_total_num_tokens": 100_000,
            "kv_events": {
                "publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": publisher.port, "topic": "",
                "block_size": 4, "dp_size": 1, "replay_endpoint_port_base": publisher.replay_port,
            },
        }  # fmt: skip
        try:
            async with proxy_before(engine) as proxy:
                await publisher.joined()
                await wait_until(lambda: publisher.serve_replay() or knowledge(proxy) == "exact")
                answer = await ask(proxy.port, post("/generate", {"input_ids": TOKENS[:9]}))
                assert answer.headers["x-dynamo-matched-tokens"] == "8"
        finally:
            publisher.close()

    run(body())


def test_a_text_prompt_becomes_exact_after_the_engine_tokenised_it() -> None:
    async def body() -> None:
        publisher = Publisher()
        async with fleet(publisher) as (proxy, _):
            await wait_until(lambda: knowledge(proxy) == "exact")
            prompt = "tell me something long about this document, please. " * 30
            await ask(proxy.port, post("/v1/chat/completions", chat(prompt)))
            await wait_until(lambda: len(proxy.knowledge.memo) > 0, "tokens learnt")
            tokens = [ord(letter) for letter in prompt]  # the fake engine's tokeniser
            publisher.publish(stored(1, tokens))
            await wait_until(lambda: blocks(proxy) == len(tokens) // 4)
            proxy.knowledge.approx.forget_nodes(0)  # only the events can know it now
            proxy.knowledge.approx.forget_nodes(1)
            answer = await ask(proxy.port, post("/v1/chat/completions", chat(prompt)))
            assert answer.headers["x-dynamo-engine"] == "engine-0"
            assert int(answer.headers["x-dynamo-matched-tokens"]) > 100
            assert b'tokenizations_total{reason="learnt"}' in proxy.front_end.metrics()

    run(body())


def test_without_events_asked_for_nobody_subscribes() -> None:
    async def body() -> None:
        publisher = Publisher()
        engine = await FakeEngine().start()
        engine.event_sources = publisher.vllm_sources
        try:
            async with proxy_before(engine, use_kv_events=False) as proxy:
                assert proxy.registry.at(0).event_feeds == 0
                assert knowledge(proxy) == "approximate"
        finally:
            publisher.close()

    run(body())
