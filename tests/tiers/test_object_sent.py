"""What an object store says of a failed upload: whether it may have left something there, which is then erased."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from dynamo_connectors.tiers import object as object_module
from dynamo_connectors.tiers.base import Batch
from dynamo_connectors.tiers.object import ObjectStore
from tests.tiers.object_stores import CHUNK, KEYS, ROWS, SETTINGS, ended, object_store, places_of
from tests.tiers.s3_servers import Behaviour, FaultServer, answer, hang, moto_server, say

NOT_THERE = say(answer("404 Not Found"))
UNAVAILABLE, FORBIDDEN = say(answer("503 Slow Down")), say(answer("403 Forbidden"))


@pytest.fixture(autouse=True)
def environment(credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_module, "_UPLOAD_SECONDS", 60.0)


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour, Behaviour], FaultServer]]:
    """A service that behaves in one way when it is asked for an object, in another when it is given one."""
    servers: list[FaultServer] = []

    def start(head: Behaviour, put: Behaviour) -> FaultServer:
        def behave(connection: socket.socket, request: str) -> None:
            (put if request.startswith("PUT") else head)(connection, request)

        servers.append(FaultServer(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def upload(store: ObjectStore, rows: int = len(KEYS)) -> Batch:
    """Waited for."""
    (batch,) = store.write(places_of(CHUNK, KEYS[:rows]), ROWS[:rows])
    ended(batch.outcome)
    return batch


@pytest.mark.parametrize(
    ("head", "put", "reason", "sent"),
    [
        pytest.param(UNAVAILABLE, hang, "unavailable", False, id="503 before it"),
        pytest.param(say(b""), hang, "unreachable", False, id="hangs up before it"),
        pytest.param(NOT_THERE, FORBIDDEN, "forbidden", False, id="403"),
        pytest.param(NOT_THERE, UNAVAILABLE, "unavailable", True, id="503"),
        pytest.param(NOT_THERE, say(b""), "unreachable", True, id="hangs up"),
    ],
)
def test_only_what_set_out_may_have_been_left_there(
    serve: Callable[..., FaultServer], head: Behaviour, put: Behaviour, reason: str, sent: bool
) -> None:
    with object_store(serve(head, put).url) as store:
        batch = upload(store)
        assert store.stats().failures == {reason: 1}
        assert batch.sent() is sent


@pytest.mark.parametrize(("head", "seconds", "sent"), [(hang, 0.3, False), (NOT_THERE, 4.0, True)])
def test_an_upload_that_hangs_is_given_up(
    serve: Callable[..., FaultServer], monkeypatch: pytest.MonkeyPatch, head: Behaviour, seconds: float, sent: bool
) -> None:
    """Long enough for the question before the upload, where that is answered."""
    monkeypatch.setattr(object_module, "_UPLOAD_SECONDS", seconds)
    with object_store(serve(head, hang).url) as store:
        batch = upload(store)
        assert store.stats().failures == {"timeout": 1}
        assert batch.sent() is sent


def test_an_upload_that_was_refused_here_left_nothing(serve: Callable[..., FaultServer]) -> None:
    began, go = threading.Event(), threading.Event()

    def slow(connection: socket.socket, _: str) -> None:
        began.set()
        go.wait(60)
        connection.sendall(answer("503 Slow Down"))

    one_object = replace(SETTINGS, upload_queue_bytes=1)
    with object_store(serve(slow, slow).url, one_object) as store:
        assert not upload(store, rows=2).sent()
        (first,) = store.write(places_of(CHUNK, KEYS), ROWS)
        assert began.wait(60)
        assert not upload(store).sent()
        assert store.stats().failures == {"not_whole": 1, "upload_backlog": 1}
        go.set()
        ended(first.outcome)
        for _ in range(3):
            batch = upload(store)
        assert not batch.sent()
        assert store.stats().failures["tier_off"] == 1
        store.forget()
        assert not upload(store).sent()


def test_an_object_that_was_there_is_not_ours() -> None:
    with moto_server() as moto, object_store(moto.url) as first, object_store(moto.url) as second:
        assert upload(first).sent()
        assert not upload(second).sent()
