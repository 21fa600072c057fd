"""What an exchange works with: its client's side, and the parts of the proxy that all exchanges share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .access_log import RequestLog
from .config import Limits, Timeouts
from .flow_control import FlowControl
from .metrics import Metrics
from .router import Router
from .tokens import TokenLearner


class ClientSide(Protocol):
    """The client connection as an exchange sees it."""

    flow: FlowControl

    def write(self, data: bytes) -> None: ...
    def finish(self, keep_alive: bool) -> None: ...
    def cut(self, reset: bool = False) -> None: ...
    def refuse(self, status: int, code: str, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What every exchange needs."""

    router: Router
    metrics: Metrics
    tokens: TokenLearner
    limits: Limits
    timeouts: Timeouts
    log: RequestLog | None = None
    prefill_seconds: float = 60.0  # how long a prefill engine may take
