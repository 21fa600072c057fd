"""Control traffic to engines and to the proxy's admin port. Every failure becomes one ObservationError
with a reason.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ObservationError
from .exposition import EngineReading, parse_engine_metrics

if TYPE_CHECKING:
    from aiohttp import ClientSession

_MAX_ANSWER_BYTES = 8 << 20  # vLLM's /metrics is about 58 KB (reference/vllm.md 6)


@dataclass(frozen=True)
class ListedEngine:
    """One engine as the proxy sees it; `state` is starting, ready, draining or down."""

    url: str
    state: str
    in_flight: int
    was_ready: bool = True  # at some time
    role: str = ""


@dataclass(frozen=True)
class ProxyListing:
    """The answer of the proxy's `GET /engines`."""

    engines: tuple[ListedEngine, ...]
    arrivals_total: float
    prompt_tokens_total: float
    matched_tokens_total: float = 0.0

    def find(self, url: str) -> ListedEngine | None:
        return next((engine for engine in self.engines if engine.url == url), None)


class Peers:
    """Requests with one time limit. The session belongs to the caller."""

    def __init__(self, session: ClientSession, timeout_seconds: float) -> None:
        self._session = session
        self._timeout_seconds = timeout_seconds

    async def scrape(self, url: str) -> EngineReading:
        """One reading of an engine's /metrics. Raises ObservationError."""
        status, body = await self.request("GET", f"{url}/metrics")
        if status != 200:
            hint = "; start SGLang with --enable-metrics" if status == 404 else ""
            raise ObservationError("http_status", f"{url}/metrics answered {status}{hint}")
        return parse_engine_metrics(body)

    async def healthy(self, url: str) -> bool:
        try:
            return (await self.request("GET", f"{url}/health"))[0] == 200
        except ObservationError:
            return False

    async def request(self, method: str, url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """(status, text). Raises ObservationError for everything that is not an HTTP answer in time."""
        import aiohttp

        limit = aiohttp.ClientTimeout(total=self._timeout_seconds)
        try:
            async with self._session.request(method, url, json=body, timeout=limit) as answer:
                raw = await answer.content.read(_MAX_ANSWER_BYTES)
                while not answer.content.at_eof():
                    if len(raw) >= _MAX_ANSWER_BYTES:
                        raise ObservationError("too_large", f"{url} answered more than {_MAX_ANSWER_BYTES} bytes")
                    raw += await answer.content.read(_MAX_ANSWER_BYTES)
                return answer.status, raw.decode("utf-8", errors="replace")
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise ObservationError("timeout", f"{url} gave no answer in {self._timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ObservationError("unreachable", f"{url} cannot be reached: {str(error) or repr(error)}") from error


class ProxyAdmin:
    """The proxy's admin contract: list, register, drain, resume, remove. What is registered has the pool's `role`."""

    def __init__(self, peers: Peers, admin_url: str, role: str = "aggregated") -> None:
        self._peers = peers
        self._suffix = "" if role == "aggregated" else f",role={role}"
        self._url = f"{admin_url}/engines"

    async def engines(self) -> ProxyListing:
        """The proxy's own account. Raises ObservationError."""
        status, body = await self._peers.request("GET", self._url)
        if status != 200:
            raise ObservationError("proxy_status", f"{self._url} answered {status}; is this the proxy's admin port?")
        try:
            answer = json.loads(body)
            engines = tuple(
                ListedEngine(
                    str(entry["url"]).rstrip("/"),
                    str(entry["state"]),
                    int(entry["in_flight"]),
                    bool(entry.get("was_ready", True)),
                    str(entry.get("role", "")),
                )
                for entry in answer["engines"]
            )
            arrivals = float(answer.get("arrivals_total", 0))
            tokens = float(answer.get("prompt_tokens_total", 0))
            matched = float(answer.get("matched_tokens_total", 0))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            text = f"{self._url} gave an unexpected answer; is this the proxy's admin port?"
            raise ObservationError("proxy_unreadable", text) from error
        if not all(0 <= total < math.inf for total in (arrivals, tokens, matched)):
            raise ObservationError("proxy_unreadable", f"{self._url} gave totals that are no counts")
        return ProxyListing(engines, arrivals, tokens, matched)

    async def register(self, url: str) -> int:
        return (await self._peers.request("POST", self._url, {"url": url + self._suffix}))[0]

    async def drain(self, url: str) -> int:
        return (await self._peers.request("POST", f"{self._url}/drain", {"url": url}))[0]

    async def resume(self, url: str) -> int:
        return (await self._peers.request("POST", f"{self._url}/resume", {"url": url}))[0]

    async def remove(self, url: str) -> int:
        from urllib.parse import quote

        return (await self._peers.request("DELETE", f"{self._url}?url={quote(url, safe='')}"))[0]
