"""What an exchange works with: the parts of the proxy that all exchanges share."""

from __future__ import annotations

from dataclasses import dataclass

from .access_log import RequestLog
from .config import Limits, Timeouts
from .metrics import Metrics
from .router import Router
from .tokens import TokenLearner


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
