"""TLS on both sides: real handshakes, real certificates, and what is not trusted is not spoken to."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import socket
import ssl
from pathlib import Path
from unittest.mock import Mock

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from dynamo_proxy import client_connection
from dynamo_proxy.config import EngineAddress, TlsFiles, parse_engine_url
from dynamo_proxy.engines import Health
from dynamo_proxy.errors import ConfigError
from dynamo_proxy.tls import ServerTls

from tests.proxy.proxy_fakes import Client, FakeEngine, chat, post, proxy_before, run, wait_until
from tests.proxy.test_proxy_cli import ENGINE, call


def certificate(folder: Path, name: str = "cert") -> str:
    """A PEM file with a key and a certificate for 127.0.0.1 that vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    cert = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + cert.public_bytes(serialization.Encoding.PEM)
    )
    return str(path)


class TlsEngine(FakeEngine):
    """A fake engine behind TLS."""

    def __init__(self, pem: str) -> None:
        super().__init__()
        self._pem = pem

    @property
    def address(self) -> EngineAddress:
        return parse_engine_url(f"https://127.0.0.1:{self.port}")

    async def start(self, port: int = 0) -> TlsEngine:
        await super().start(port)
        assert self._runner is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._pem)
        for site in list(self._runner.sites):
            await site.stop()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context).start()
        self.port = self._runner.addresses[0][1]
        return self


def spoil(path: str) -> None:
    Path(path).write_text("not a certificate")


async def tls_client(port: int, pem: str) -> Client:
    context = ssl.create_default_context(cafile=pem)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=1 << 26)
    return Client(reader, writer)


def test_answers_and_streams_pass_through_tls_on_both_sides(tmp_path: Path) -> None:
    async def body() -> None:
        front, back = certificate(tmp_path, "front"), certificate(tmp_path, "back")
        engine = await TlsEngine(back).start()
        async with proxy_before(engine, tls=TlsFiles(front, "", back), engine_api_key="engines-own") as proxy:
            client = await tls_client(proxy.port, front)
            client.send(post("/v1/chat/completions", chat(), "authorization: Bearer mine"))
            assert (await client.answer()).json()["choices"][0]["message"]["content"] == "hello"
            seen = engine.requests[0][1].values()
            assert "Bearer engines-own" in seen
            assert "Bearer mine" not in seen
            client.send(post("/v1/chat/completions", chat(stream=True)))
            assert (await client.answer()).body.endswith(b"[DONE]\n\n")
            large = chat("x" * 3_000_000)
            client.send(post("/v1/chat/completions", large))
            assert (await client.answer()).json()["received_bytes"] > 3_000_000
            client.writer.close()
            await client.writer.wait_closed()

    run(body())


def test_a_client_that_does_not_read_holds_its_engine_back_through_tls(tmp_path: Path) -> None:
    async def body() -> None:
        front, back = certificate(tmp_path, "front"), certificate(tmp_path, "back")
        engine = await TlsEngine(back).start()
        engine.chunks = 200_000
        async with proxy_before(engine, tls=TlsFiles(front, "", back)) as proxy:
            client = await tls_client(proxy.port, front)
            client.send(post("/v1/chat/completions", chat(stream=True)))
            await client.head()
            client.writer.transport.pause_reading()  # asyncio would read on into memory
            await wait_until(lambda: any(c.flow.writing_paused for c in proxy.front_end.clients), "back-pressure")
            proxy.check()
            client.writer.transport.abort()
            await wait_until(lambda: engine.active == 0, "the engine stops")

    run(body())


def test_a_client_that_never_answers_the_close_does_not_hold_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_connection, "_LINGER_SECONDS", 0.1)

    async def body() -> None:
        pem = certificate(tmp_path)
        async with proxy_before(await FakeEngine().start(), tls=TlsFiles(pem)) as proxy:
            context = ssl.create_default_context(cafile=pem)
            with socket.create_connection(("127.0.0.1", proxy.port)) as plain:
                client = await asyncio.to_thread(context.wrap_socket, plain, server_hostname="127.0.0.1")
                client.sendall(post("/v1/chat/completions", chat()))
                assert (await asyncio.to_thread(client.recv, 100)).startswith(b"HTTP/1.1 200")
                assert await proxy.drain(20)  # the event loop would wait 30 s for an answer
                client.close()

    run(body())


def test_an_engine_that_is_not_trusted_gets_no_request(tmp_path: Path) -> None:
    async def body() -> None:
        trusted, other = certificate(tmp_path, "trusted"), certificate(tmp_path, "other")
        engine = await TlsEngine(other).start()
        async with proxy_before(engine, tls=TlsFiles("", "", trusted), ready=False) as proxy:
            await wait_until(lambda: proxy.monitor.watches[0].looked.is_set())
            assert proxy.registry.at(0).health is Health.STARTING
            proxy.registry.at(0).health = Health.READY  # what the data path says of it
            sink = Mock()
            await proxy.registry.at(0).pool.dial(sink)
            sink.on_dialled.assert_called_once_with(None, "tls_failed")
            assert engine.requests == []

    run(body())


def test_plain_bytes_on_a_tls_port_cost_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        pem = certificate(tmp_path)
        engine = await FakeEngine().start()
        async with proxy_before(engine, tls=TlsFiles(pem)) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(post("/v1/chat/completions", chat()))
            assert b"HTTP" not in await reader.read()
            writer.close()
            assert engine.requests == []

    run(body())


def test_a_renewed_certificate_is_used_and_a_bad_one_is_not(tmp_path: Path) -> None:
    async def body() -> None:
        path = certificate(tmp_path)
        engine = await FakeEngine().start()
        async with proxy_before(engine, tls=TlsFiles(path)) as proxy:
            assert proxy.tls is not None
            assert not proxy.tls.reload()
            os.rename(certificate(tmp_path, "renewed"), path)
            os.utime(path, (1, 1))
            assert proxy.tls.reload()
            client = await tls_client(proxy.port, path)  # trusts the renewed one only
            spoil(path)
            assert not proxy.tls.reload()
            client.writer.close()
            await client.writer.wait_closed()
            ServerTls.check(proxy.tls)

    run(body())


def test_files_that_cannot_work_are_one_clear_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no")
    for arguments in (
        ["--tls-cert-file", str(bad)],
        ["--tls-key-file", str(bad)],
        ["--engine-ca-file", str(bad)],
        ["--engine-api-key-file", "/none"],
    ):
        code, stderr = call(*ENGINE, *arguments)
        assert (code, stderr.count("\n")) == (2, 1), stderr
        assert arguments[0] in stderr


def test_a_key_that_is_locked_or_elsewhere_is_told_as_that(tmp_path: Path) -> None:
    whole = Path(certificate(tmp_path)).read_bytes()
    key = serialization.load_pem_private_key(whole, None)
    locked, alone = tmp_path / "locked.pem", tmp_path / "alone.pem"
    kinds = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(key.private_bytes(*kinds, serialization.BestAvailableEncryption(b"open")))
    alone.write_bytes(whole[whole.index(b"-----BEGIN CERTIFICATE") :])
    with pytest.raises(ConfigError, match=f"{locked} is encrypted; write it without a passphrase"):
        ServerTls(str(alone), str(locked))
    with pytest.raises(ConfigError, match=f"{alone} .no PEM key is in .*; .* --tls-key-file"):
        ServerTls(str(alone), "")


@pytest.mark.parametrize(("url", "canonical"), [("https://a", "https://a:443"), ("https://a:8443/", "https://a:8443")])
def test_https_engine_urls_are_read(url: str, canonical: str) -> None:
    assert parse_engine_url(url).url == canonical
    assert parse_engine_url(url).tls
