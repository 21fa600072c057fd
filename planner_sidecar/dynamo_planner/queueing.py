"""Waiting time in M/G/1 and M/G/N queues, and the smallest number of servers that keeps a share of requests in time.

A server is a replica that prefills one prompt at a time; service times are spread log-normally around their mean.
Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

MAX_UTILISATION = 0.92  # beyond it a queue is longer than any estimate of its parameters is good
_QUANTILES = 10
_NORMAL = tuple(NormalDist().inv_cdf((k + 0.5) / _QUANTILES) for k in range(_QUANTILES))


@dataclass(frozen=True)
class Service:
    """Service time of one request: mean in seconds and squared coefficient of variation."""

    mean_seconds: float
    cv2: float


def waiting_exceeds(rate: float, service: Service, servers: int, limit_seconds: float) -> float:
    """Probability that a request at `rate` requests/s waits longer than the limit for one of `servers`.

    One server: rho * exp(-2(1-rho)t / (S(1+cv2))), the heavy-traffic tail of M/G/1; more: Erlang's C in front.
    """
    load = rate * service.mean_seconds
    if load >= servers:
        return 1.0
    if load <= 0:
        return 0.0
    delayed = erlang_c(servers, load)
    decay = 2.0 * (servers - load) / (service.mean_seconds * (1.0 + service.cv2))
    return delayed * math.exp(-decay * max(0.0, limit_seconds))


def erlang_c(servers: int, load: float) -> float:
    """Probability that all `servers` are busy at `load` erlangs below `servers`."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    return servers * blocked / (servers - load * (1.0 - blocked))


def service_quantiles(service: Service) -> tuple[float, ...]:
    """Equally likely service times of a log-normal with the given mean and spread."""
    sigma2 = math.log1p(max(0.0, service.cv2))
    sigma, mu = math.sqrt(sigma2), math.log(max(service.mean_seconds, 1e-9)) - sigma2 / 2
    return tuple(math.exp(mu + sigma * z) for z in _NORMAL)


def late_share(rate: float, service: Service, servers: int, target_seconds: float) -> float:
    """Share of requests whose waiting plus own service exceeds the target."""
    late = 0.0
    for own in service_quantiles(service):
        slack = target_seconds - own
        late += 1.0 if slack <= 0 else waiting_exceeds(rate, service, servers, slack)
    return late / _QUANTILES


def servers_for(rate: float, service: Service, target_seconds: float, attainment: float, pooled: bool) -> int:
    """Smallest number of servers that is on time for `attainment` of the requests that can be on time at all.

    `pooled`: the router knows the queues, so the fleet acts as one M/G/N queue; else each replica is an M/G/1 queue.
    """
    alone = sum(own >= target_seconds for own in service_quantiles(service)) / _QUANTILES
    allowed = alone + (1.0 - alone) * (1.0 - attainment)
    load = max(0.0, rate * service.mean_seconds)

    def good(count: int) -> bool:
        if load / count > MAX_UTILISATION:
            return False
        if alone >= 1.0:  # no request can be on time: only the load is bounded
            return True
        share, servers = (rate, count) if pooled else (rate / count, 1)
        return late_share(share, service, servers, target_seconds) <= allowed + 1e-12

    low = max(1, math.ceil(load / MAX_UTILISATION - 1e-9))
    high = low
    while not good(high):
        high *= 2
    while low < high:  # more servers are never later: bisect
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    return high
