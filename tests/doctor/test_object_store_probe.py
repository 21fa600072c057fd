"""The doctor's look at a bucket: a real S3 service, and one that refuses or hangs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from dynamo_connectors.doctor import object_store
from dynamo_connectors.doctor.finding import Finding, Level
from dynamo_connectors.doctor.object_store import examine_object_store
from tests.tiers.s3_servers import BUCKET, CREDENTIALS, SECRET, FaultServer, Moto, answer, hang, moto_server, say

URL = f"s3://{BUCKET}/kv"


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with moto_server() as server:
        yield server


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


def ask(url: str | None, endpoint_url: str | None) -> Finding:
    (finding,) = examine_object_store(url, endpoint_url)
    assert SECRET not in finding.detail + finding.remedy
    return finding


def test_a_good_bucket_is_left_as_it_was(moto: Moto) -> None:
    finding = ask(URL, moto.url)
    assert (finding.level, moto.names()) == (Level.OK, [])


def test_without_a_url_nothing_is_asked() -> None:
    assert examine_object_store(None, None) == []


def test_a_missing_bucket_fails(moto: Moto) -> None:
    finding = ask("s3://another/kv", moto.url)
    assert finding.level is Level.FAIL
    assert "create the bucket" in finding.remedy


def test_credentials_that_are_refused_fail(moto: Moto) -> None:
    with moto.refusing_everybody():
        finding = ask(URL, moto.url)
    assert finding.level is Level.FAIL
    assert "AWS_ACCESS_KEY_ID" in finding.remedy


def test_a_store_that_can_only_be_read_is_a_warning() -> None:
    empty = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    server = FaultServer(lambda to, line: to.sendall(answer("200 OK", empty) if "GET" in line else answer("403 No")))
    try:
        finding = ask(URL, server.url)
    finally:
        server.close()
    assert (finding.level, "cannot store" in finding.detail) == (Level.WARN, True)


@pytest.mark.parametrize(("behave", "words"), [(hang, "no answer"), (say(answer("503 Slow")), "503")])
def test_a_store_that_is_not_well_fails(behave: object, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "DEADLINE_SECONDS", 0.5)
    server = FaultServer(behave)  # type: ignore[arg-type]
    try:
        finding = ask(URL, server.url)
    finally:
        server.close()
    assert finding.level is Level.FAIL
    assert words in finding.detail


@pytest.fixture
def without_keys(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_no_credentials_on_a_machine_without_metadata_service(without_keys: pytest.MonkeyPatch) -> None:
    """The store is down too, and nobody gets as far as asking it."""
    without_keys.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    finding = ask(URL, "http://127.0.0.1:1")
    assert finding.level is Level.FAIL
    assert "no credentials found" in finding.detail
    assert "instance role" in finding.remedy
    assert "ListBucket" not in finding.remedy


def no_role(to: socket.socket, line: str) -> None:
    to.sendall(answer("200 OK", b"token") if "token" in line else answer("404 Not Found"))


@pytest.mark.parametrize("behave", [no_role, say(answer("404 No")), say(answer("403 denied")), say(answer("500 No"))])
def test_no_credentials_is_not_told_as_a_fault_of_the_bucket(
    behave: Callable[[socket.socket, str], None], without_keys: pytest.MonkeyPatch
) -> None:
    server = FaultServer(behave)
    without_keys.setenv("AWS_METADATA_ENDPOINT", server.url)
    try:
        finding = ask(URL, "http://127.0.0.1:1")
    finally:
        server.close()
    assert server.requests, "the role was never asked for"
    assert "no_credentials" in finding.detail
    assert "AWS_ACCESS_KEY_ID" in finding.remedy
    assert "create the bucket" not in finding.remedy
