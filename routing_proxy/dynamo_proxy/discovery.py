"""Engines that come and go by themselves: found in a file, in DNS or in Kubernetes, added, drained and removed.

A source that cannot be asked changes nothing: the engines found before stay. What an operator added stays too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import orjson

from .config import ROLES, DiscoverySources, EngineAddress, EngineOptions, parse_engine_url, parse_options
from .engines import Engine, EngineRegistry
from .errors import ConfigError, DiscoveryError, EngineBusyError, UnknownEngineError
from .ledger import Ledger

ROLE_LABEL = "dynamo-connectors/role"  # of a service: its endpoints carry it too
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT = aiohttp.ClientTimeout(total=10)
log = logging.getLogger("dynamo_proxy")


class Source(Protocol):
    """Where engines are named. `look` raises DiscoveryError if it cannot be asked."""

    name: str

    async def look(self) -> frozenset[EngineAddress]: ...


class Fleet(Protocol):
    """The engines of a proxy."""

    registry: EngineRegistry
    ledger: Ledger

    def add_engine(self, address: EngineAddress) -> Engine: ...
    async def remove_engine(self, engine: Engine) -> None: ...


class FileSource:
    """A file of engines, one a line, written as for --engine."""

    def __init__(self, path: str) -> None:
        self.name = f"--engines-file {path}"
        self._path = Path(path)

    async def look(self) -> frozenset[EngineAddress]:
        found = self.read()
        if found is None:
            raise DiscoveryError("it is empty (a comment alone takes all of its engines away)")
        return found

    def read(self) -> frozenset[EngineAddress] | None:
        """None for an empty file: mostly somebody is writing it just now. Raises DiscoveryError naming the line."""
        try:
            text = self._path.read_text()  # a small local file
        except (OSError, UnicodeDecodeError) as error:
            raise DiscoveryError(str(error)) from None
        found = set()
        for number, line in enumerate(text.splitlines(), 1):
            word = line.partition("#")[0].strip()
            try:
                if word:
                    found.add(parse_engine_url(word))
            except ConfigError as error:
                raise DiscoveryError(f"line {number}: {error}") from None
        return frozenset(found) if text.strip() else None


class DnsSource:
    """Every address that a name has, as of a headless service."""

    def __init__(self, url: str) -> None:
        self.name = f"--engine-dns {url}"
        self._named = parse_engine_url(url)

    async def look(self) -> frozenset[EngineAddress]:
        named = self._named
        try:
            found = await asyncio.get_running_loop().getaddrinfo(named.host, named.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise DiscoveryError(str(error)) from None
        return frozenset(replace(named, host=str(address[0])) for _, _, _, _, address in found)


class KubernetesSource:
    """The ready endpoints of a service, from EndpointSlices, or from Endpoints where there are none yet."""

    def __init__(self, service: str, api: str, account: Path = _ACCOUNT) -> None:
        self.name = f"--engine-k8s-service {service}"
        self._namespace, self._service, self._port, self._options = parse_service(service)
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        self._api = api or (f"https://{f'[{host}]' if ':' in host else host}:{port}" if host else "")
        self._account = account

    async def look(self) -> frozenset[EngineAddress]:
        if not self._api:
            raise DiscoveryError("not inside a cluster; name the API server with --kubernetes-api http://HOST:PORT")
        group = f"{self._api}/apis/discovery.k8s.io/v1/namespaces/{self._namespace}/endpointslices"
        status, answer = await self._get(f"{group}?labelSelector=kubernetes.io/service-name={self._service}")
        if status == 404:
            status, answer = await self._get(
                f"{self._api}/api/v1/namespaces/{self._namespace}/endpoints/{self._service}"
            )
            if status == 404:
                return frozenset()
        if status != 200:
            raise DiscoveryError(f"the API server answers {status}: {answer.get('message', 'no reason given')}")
        return frozenset(replace(found, options=self._with_label(label)) for found, label in _found(answer, self._port))

    def _with_label(self, role: str) -> EngineOptions:
        return self._options if self._options.role or role not in ROLES else replace(self._options, role=role)

    async def _get(self, url: str) -> tuple[int, dict[str, Any]]:
        token, authority = self._account / "token", self._account / "ca.crt"
        try:
            headers = {"authorization": f"Bearer {token.read_text().strip()}"} if token.exists() else {}  # it rotates
            tls = _context(authority) if authority.exists() else True
            async with (
                aiohttp.ClientSession(timeout=_TIMEOUT, headers=headers) as session,
                session.get(url, ssl=tls) as answer,
            ):
                said = orjson.loads(await answer.read())
                return answer.status, said if isinstance(said, dict) else {}
        except orjson.JSONDecodeError:
            raise DiscoveryError("the API server does not answer in JSON") from None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise DiscoveryError(f"the API server cannot be asked ({error or 'timeout'})") from None


def _context(authority: Path) -> Any:
    import ssl

    return ssl.create_default_context(cafile=str(authority))


def parse_service(text: str) -> tuple[str, str, str, EngineOptions]:
    """The parts and settings of NAMESPACE/SERVICE:PORT_OR_ITS_NAME[,NAME=VALUE]. Raises ConfigError."""
    where, *settings = text.split(",")
    place, _, port = where.rpartition(":")
    namespace, _, service = place.partition("/")
    if not namespace or not service or not port or "/" in service:
        raise ConfigError(f"--engine-k8s-service {text!r} is not NAMESPACE/SERVICE:PORT; for example llm/vllm:8000")
    return namespace, service, port, parse_options(where, settings)


def _found(answer: dict[str, Any], port: str) -> Iterable[tuple[EngineAddress, str]]:
    """Addresses, and roles by label, in an EndpointSliceList or an Endpoints object."""
    for piece in answer.get("items") or (answer,):
        role = ((piece.get("metadata") or {}).get("labels") or {}).get(ROLE_LABEL, "")
        for address in _endpoints(piece, port):
            yield address, role


def _endpoints(piece: dict[str, Any], port: str) -> Iterable[EngineAddress]:
    """Addresses in an EndpointSlice or an Endpoints object."""
    for number in _port_numbers(piece.get("ports"), port) if piece.get("endpoints") else ():
        for endpoint in piece["endpoints"]:
            if (endpoint.get("conditions") or {}).get("ready") is not False:
                yield from (EngineAddress(host, number) for host in endpoint.get("addresses") or ())
    for subset in piece.get("subsets") or ():
        for number in _port_numbers(subset.get("ports"), port):
            yield from (EngineAddress(address["ip"], number) for address in subset.get("addresses") or ())


def _port_numbers(ports: Any, wanted: str) -> list[int]:
    if wanted.isdigit():
        return [int(wanted)]
    return [port["port"] for port in ports or () if port.get("name") == wanted]


class Discovery:
    """Keeps a fleet as the sources say."""

    def __init__(self, settings: DiscoverySources, fleet: Fleet) -> None:
        self._fleet = fleet
        self._seconds = settings.interval_seconds
        self._sources: list[Source] = [FileSource(path) for path in settings.files]
        self._sources += [DnsSource(url) for url in settings.dns]
        self._sources += [KubernetesSource(service, settings.kubernetes_api) for service in settings.services]
        self._found: dict[str, frozenset[EngineAddress]] = {}
        self._told: dict[str, str] = {}
        self._leaving: set[Engine] = set()
        #: What the worker before this one had from them, until all of them have said what they name now.
        self._inherited: list[EngineAddress] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look once, then again and again."""
        if self._sources:
            known = [engine.address for engine in self._fleet.registry]
            self._inherited = [address for address in known if address.options.discovered]
            await self.turn()
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self.turn()

    async def turn(self) -> None:
        """Ask every source once, and bring the fleet in line."""
        for source in self._sources:
            try:
                found = await source.look()
            except DiscoveryError as error:
                if self._told.get(source.name) != str(error):
                    kept = "; the engines found before stay" if source.name in self._found else ""
                    log.warning("%s: %s%s", source.name, error, kept)
                self._told[source.name] = str(error)
                continue
            self._told.pop(source.name, None)
            before = self._found.get(source.name, frozenset())
            self._found[source.name] = found
            for address in found - before:
                self._came(address)
            for address in before - found:
                self._went(address)
        if all(source.name in self._found for source in self._sources):
            for address in self._inherited:
                self._went(address)
            self._inherited = []
        for engine in list(self._leaving):
            await self._let_go(engine)

    def _came(self, address: EngineAddress) -> None:
        engine = self._fleet.add_engine(replace(address, options=replace(address.options, discovered=True)))
        if engine in self._leaving:
            self._leaving.discard(engine)
            engine.draining = False
        log.info("engine %s is found", address.url)

    def _went(self, address: EngineAddress) -> None:
        if any(address in found for found in self._found.values()):
            return  # another source still names it
        with contextlib.suppress(UnknownEngineError):
            engine = self._fleet.registry.find(address)
            if engine.address.options.discovered:
                engine.draining = True
                self._leaving.add(engine)
                log.info("engine %s is gone: it drains", address.url)

    async def _let_go(self, engine: Engine) -> None:
        with contextlib.suppress(EngineBusyError):
            with contextlib.suppress(UnknownEngineError):  # an operator was faster
                await self._fleet.remove_engine(engine)
            self._leaving.discard(engine)

    def check(self) -> None:
        for engine in self._leaving:
            assert engine.draining, f"{engine.name} leaves and takes requests"
        assert self._task is None or not self._task.done(), "nobody looks for engines"
