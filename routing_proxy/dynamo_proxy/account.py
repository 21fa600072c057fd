"""What is told of one request: numbers, receipt, its line in the log, and what its caller is charged."""

from __future__ import annotations

from .access_log import Ended
from .guard import Meter
from .intake import Asked, asks_for_stream
from .metrics import Metrics
from .receipts import Receipt, receipt_of
from .router import Placement
from .services import Services

# Not the client's mistakes: too many requests, and clients that did not wait.
_MISSES = (429, 499)


def missed(asked: Asked, status: int, metrics: Metrics) -> None:
    """A request that wanted a first token by some time is over without one."""
    slo, why = asked.prompt.slo, "left" if status == 499 else "refused"
    if slo is not None and (status in _MISSES or status >= 500) and asks_for_stream(asked.request.body):
        metrics.slo.labels(slo.name, why).inc()


class Account:
    """The account of one request, closed once."""

    __slots__ = ("_asked", "_endpoint", "_is_stream", "_meter", "_receipt", "_services", "arrived")

    def __init__(self, asked: Asked, endpoint: str, services: Services, meter: Meter | None, now: float) -> None:
        self._asked = asked
        self._endpoint = endpoint
        self._services = services
        self._meter = meter
        self._receipt: Receipt | None = None
        self._is_stream = False  # whose first token came
        self.arrived = now

    def explain(
        self, placement: Placement, tries: int, now: float, seconds: float, prefilled: tuple[str, str]
    ) -> bytes:
        """Make the receipt, if anybody wants one; as a header line if the client does."""
        wanted = self._asked.request.head.wants_route
        if not wanted and self._services.log is None:
            return b""
        spent = (seconds, now - self.arrived)
        self._receipt = receipt_of(placement, self._services.router.state, tries, spent, prefilled)
        return self._receipt.header() if wanted else b""

    def began(self, placement: Placement, status: int, now: float, seconds: float, is_token: bool) -> None:
        """The first byte came, so long after the engine was asked; `is_token`: it begins a stream."""
        services, engine, prompt = self._services, placement.engine, self._asked.prompt
        learns = is_token and not engine.hands_over  # a prompt that came from elsewhere teaches nothing
        services.router.first_byte(placement, seconds if learns else 0.0)
        if status >= 500:
            services.router.failed(engine, f"status_{status}")
        elif engine.breaker.score:
            engine.breaker.passed()  # unless it was so late that it is left alone again
        self._is_stream = is_token
        metrics, waited = services.metrics, now - self.arrived
        metrics.tallies.ttft.observe(waited)
        if is_token:
            metrics.prefilled(engine.name, seconds)
            if prompt.slo is not None:
                metrics.first_token(waited, prompt.slo)
        if status == 200:
            services.tokens.offer(prompt, engine)

    def close(self, status: int, reason: str, now: float) -> None:
        """The request is over."""
        if self._meter is not None:
            self._meter.over(now)
        if self._asked.prompt.slo is not None and not self._is_stream:
            missed(self._asked, status, self._services.metrics)
        seconds = now - self.arrived
        self._services.metrics.tallies.finished(self._endpoint, status, reason, seconds)
        if self._services.log is not None:
            ended, headers = Ended(status, reason, seconds), self._asked.request.head.passing
            self._services.log.add(self._endpoint, self._asked.prompt.model, ended, self._receipt, headers)
