"""What a client may ask of the block manager for one request, through `kv_transfer_params`. Pure.

Other keys in there belong to other connectors and are left alone. A hint that makes no sense is ignored and told: a
cache must not turn a typo into a failed request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

PIN_TTL_SECONDS = "kvbm_pin_ttl_seconds"
NO_STORE = "kvbm_no_store"
PREFETCH = "kvbm_prefetch"
#: See `fetch`, which reads them.
PEER = "kvbm_peer"
PEER_TOKENS = "kvbm_peer_tokens"
TELL_PEER = "kvbm_tell_peer"
_OURS = (PIN_TTL_SECONDS, NO_STORE, PREFETCH, PEER, PEER_TOKENS, TELL_PEER)
#: A pin keeps memory from everybody else: a day is no cache any more.
MOST_PIN_SECONDS = 86_400.0


class Hints(NamedTuple):
    """The defaults are what a request without hints gets."""

    pin_ttl_seconds: float = 0.0
    no_store: bool = False
    prefetch: bool = False


def parse_hints(params: object) -> tuple[Hints, list[str]]:
    """The hints in a request's `kv_transfer_params`, and one line for each that was ignored."""
    if not isinstance(params, Mapping):
        return Hints(), []
    ours = {key: value for key, value in params.items() if isinstance(key, str) and key.startswith("kvbm_")}
    problems = [f"unknown hint {key}; known: {', '.join(_OURS)}" for key in ours if key not in _OURS]
    flags = {}
    for key in (NO_STORE, PREFETCH):
        value = ours.get(key, False)
        flags[key] = value is True
        if not isinstance(value, bool):
            problems.append(f"hint {key} must be true or false, not {value!r:.80}")
    ttl = ours.get(PIN_TTL_SECONDS, 0)
    if not _is_number(ttl) or not 0 <= ttl <= MOST_PIN_SECONDS:
        problems.append(f"hint {PIN_TTL_SECONDS} must be a number from 0 to {MOST_PIN_SECONDS:.0f}, not {ttl!r:.80}")
        ttl = 0
    return Hints(float(ttl), flags[NO_STORE], flags[PREFETCH]), problems


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
