"""Keys, limits, control routes and internal fields: what is kept out, and that clients hear why."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from dynamo_proxy.api_keys import KeyRing, parse_keys
from dynamo_proxy.errors import ConfigError
from dynamo_proxy.guard import is_control_route
from dynamo_proxy.handoff import without_internal
from dynamo_proxy.limits import Bucket, CallerLimits
from dynamo_proxy.openapi import JSON_ROUTES
from hypothesis import given
from hypothesis import strategies as st

from tests.proxy.proxy_fakes import Client, FakeEngine, RawEngine, ask, chat, get, post, proxy_before, run
from tests.proxy.test_proxy_cli import ENGINE, call

ROUTE = "/v1/chat/completions"


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def key_file(folder: Path, *lines: str) -> str:
    path = folder / "keys"
    path.write_text("# who may call\n" + "\n".join(lines) + "\n")
    return str(path)


def test_only_known_keys_get_in_and_engines_never_see_them(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        path = key_file(tmp_path, f"alice {hashed('secret-a')}", f"bob {hashed('secret-b')}  # with a word")
        async with proxy_before(engine, api_keys_path=path) as proxy:
            for headers, status in (
                (["authorization: Bearer secret-a"], 200),
                (["Authorization: bearer  secret-b"], 200),
                (["x-api-key: secret-b"], 200),
                (["x-api-key: secret-b", "authorization: Bearer secret-b"], 200),
                ([], 401),
                (["authorization: Bearer secret"], 401),
                (["authorization: Basic secret-a"], 401),
                (["authorization: secret-a"], 401),
                (["x-api-key: secret-a", "authorization: Bearer secret-b"], 401),
                (["authorization: Bearer secret-a", "authorization: Bearer wrong"], 401),
            ):
                answer = await ask(proxy.port, post(ROUTE, chat(), *headers))
                assert answer.status == status, headers
            assert len(engine.requests) == 4
            seen = repr(engine.requests)
            assert "secret" not in seen
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert (await ask(proxy.port, get("/health"))).status == 200
            assert (await ask(proxy.port, get("/v1/models"))).status == 401
            assert (await ask(proxy.port, get("/v1/models", "x-api-key: secret-a"))).status == 200
            assert (await ask(proxy.port, get("/anything"))).status == 401

    run(body())


def test_without_keys_the_credentials_are_the_engines() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            await ask(proxy.port, post(ROUTE, chat(), "authorization: Bearer theirs"))
            assert "Bearer theirs" in engine.requests[0][1].values()

    run(body())


def test_the_file_is_read_again_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    path = Path(key_file(tmp_path, f"alice {hashed('a')} requests-per-minute=2"))
    ring = KeyRing(path, 0.0)
    alice = ring.find(b"a")
    assert alice is not None
    assert alice.limits.take(0, 0.0) == 0
    path.write_text(f"alice {hashed('new')} requests-per-minute=2\nbob {hashed('b')}\n")
    assert ring.reload(1.0)
    assert ring.find(b"a") is None
    renewed = ring.find(b"new")
    assert renewed is not None
    assert renewed.limits is alice.limits  # a new key is no new allowance
    assert not ring.reload(2.0)
    path.write_text("alice plain-text-key-by-mistake\n")
    with pytest.raises(ConfigError, match="line 1"):
        ring.reload(3.0)
    assert ring.find(b"b") is not None
    path.unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        ring.reload(4.0)
    ring.check()


def test_a_running_proxy_reads_its_keys_again(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        path = key_file(tmp_path, f"alice {hashed('old')}")
        async with proxy_before(engine, api_keys_path=path) as proxy:
            key_file(tmp_path, f"alice {hashed('brand-new')}")
            for _ in range(600):
                if (await ask(proxy.port, post(ROUTE, chat(), "x-api-key: brand-new"))).status == 200:
                    break
                await asyncio.sleep(0.05)
            assert (await ask(proxy.port, post(ROUTE, chat(), "x-api-key: old"))).status == 401

    run(body())


@pytest.mark.parametrize(
    "line",
    ["alice", "alice sha256:12", f"alice {hashed('a')} speed=3", f"alice {hashed('a')} tokens-per-minute=0",
     f"alice {hashed('a')}\nalice {hashed('b')}", f"alice {hashed('a')}\nbob {hashed('a')}"],
)  # fmt: skip
def test_mistakes_in_the_file_name_the_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line \d"):
        parse_keys(line)


def test_a_bad_file_stops_the_start_with_one_line(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), key_file(tmp_path, "alice secret")):
        code, stderr = call(*ENGINE, "--api-keys-file", path)
        assert (code, stderr.count("\n")) == (2, 1), stderr
        assert path in stderr
        assert "secret" not in stderr


def test_a_caller_that_used_up_its_requests_hears_when_to_come_back(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        path = key_file(tmp_path, f"alice {hashed('a')} requests-per-minute=2", f"bob {hashed('b')}")
        async with proxy_before(engine, api_keys_path=path) as proxy:
            answers = [await ask(proxy.port, post(ROUTE, chat(), "x-api-key: a")) for _ in range(3)]
            assert [answer.status for answer in answers] == [200, 200, 429]
            assert 1 <= int(answers[2].headers["retry-after"]) <= 60
            error = answers[2].json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert (await ask(proxy.port, post(ROUTE, chat(), "x-api-key: b"))).status == 200
            assert len(engine.requests) == 3

    run(body())


def test_tokens_are_charged_by_the_usage_that_the_engine_tells(tmp_path: Path) -> None:
    async def body() -> None:
        async def telling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            answer = json.dumps({"usage": {"prompt_tokens": 1, "total_tokens": 5000}}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer))

        engine = await RawEngine(telling).start()
        path = key_file(tmp_path, f"alice {hashed('a')} tokens-per-minute=1000")
        async with proxy_before(engine, api_keys_path=path) as proxy:
            assert (await ask(proxy.port, post(ROUTE, chat(), "x-api-key: a"))).status == 200
            refused = await ask(proxy.port, post(ROUTE, chat(), "x-api-key: a"))
            assert refused.status == 429
            assert 200 < int(refused.headers["retry-after"]) <= 241  # 4,000 in debt, 1,000 come back each minute

    run(body())


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 400)), max_size=40))
def test_a_bucket_never_grants_more_than_its_rate(steps: list[tuple[float, int]]) -> None:
    limits = CallerLimits(tokens=Bucket.full(300, 0.0))
    now, granted = 0.0, 0
    for pause, tokens in steps:
        now += pause
        if limits.take(tokens, now) == 0:
            granted += tokens
        limits.check()
    # A request larger than a minute's worth is let in when the bucket is full, and leaves a debt.
    assert granted <= 300 + now * 5 + 101


@pytest.mark.parametrize(
    "path",
    ["/sleep", "/wake_up", "/pause", "/server_info", "/get_server_info", "/kv_event_sources",
     "/update_weights_from_disk",
     "/v1/load_lora_adapter", "/unload_lora_adapter", "/flush_cache", "/reset_prefix_cache", "/abort_request",
     "/collective_rpc", "/start_profile", "/hicache/storage-backend", "/release_memory_occupation", "/weights_checker",
     "/get_weights_by_name", "/set_internal_state", "/v1/loads", "/load", "/scale_elastic_ep",
     "/fault_tolerance/apply"],
)  # fmt: skip
def test_routes_that_operate_an_engine_do_not_pass(path: str) -> None:
    assert is_control_route(path)


@pytest.mark.parametrize(
    "path",
    [*JSON_ROUTES, "/v1/audio/transcriptions", "/v1/images/generations", "/v1/responses/resp_1/cancel", "/version",
     "/v2/rerank", "/pooling", "/invocations", "/ping", "/encode", "/v1/files", "/inference/v1/generate",
     "/v1/realtime",     "/get_model_info", "/model_info", "/health_generate", "/separate_reasoning"],
)  # fmt: skip
def test_routes_that_serve_clients_pass(path: str) -> None:
    assert not is_control_route(path)


@pytest.mark.parametrize("path", ["/server_info", "/%73erver_info", "/sleep?level=1"])
def test_a_control_route_is_refused_unless_the_operator_says_so(path: str) -> None:
    async def body(allowed: bool) -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine, control_routes=allowed) as proxy:
            answer = await ask(proxy.port, post(path, {}))
            assert answer.status == (200 if allowed else 403)
            assert len([p for p, _, _ in engine.requests]) == int(allowed)

    run(body(True))
    run(body(False))


def test_fields_of_disaggregation_do_not_come_from_clients() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            internal: dict[str, Any] = {
                "bootstrap_host": "10.0.0.1",
                "bootstrap_room": 3,
                "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "x", "kvbm_no_store": True},
            }
            for path in (ROUTE, "/v1/%63hat/completions"):
                await ask(proxy.port, post(path, chat(**internal)))
            for _, _, sent in engine.requests:
                assert json.loads(sent) == chat(kv_transfer_params={"kvbm_no_store": True})
            assert len(engine.requests) == 2

    run(body())
    assert without_internal({"kv_transfer_params": {"remote_port": 1}}) == {}


def test_a_refused_request_leaves_its_connection_usable(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        path = key_file(tmp_path, f"alice {hashed('a')}")
        async with proxy_before(engine, api_keys_path=path) as proxy, Client.to(proxy.port) as client:
            client.send(post(ROUTE, chat()) + post(ROUTE, chat(), "x-api-key: a"))
            assert [(await client.answer()).status for _ in range(2)] == [401, 200]

    run(body())


def test_the_file_holds_no_secret_that_would_open_the_door(tmp_path: Path) -> None:
    digest = hashed("k").removeprefix("sha256:")
    ring = KeyRing(Path(key_file(tmp_path, f"alice {hashed('k')}")), 0.0)
    assert ring.find(digest.encode()) is None
    assert len(ring) == 1


def test_a_file_without_a_key_is_refused_and_the_keys_of_before_stay(tmp_path: Path) -> None:
    path = Path(key_file(tmp_path, f"alice {hashed('k')}"))
    ring = KeyRing(path, 0.0)
    path.write_text("")
    with pytest.raises(ConfigError, match="no API key is in"):
        ring.reload(0.0)
    assert ring.find(b"k") is not None
    with pytest.raises(ConfigError, match="no API key is in"):
        KeyRing(path, 0.0)
