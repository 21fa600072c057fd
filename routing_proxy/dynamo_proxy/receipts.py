"""Why a request went where it went: for the client that asks, and for the log."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from .knowledge import TIER_NAMES
from .router import Placement, RoutingState


@dataclass(frozen=True, slots=True)
class Receipt:
    """One request's way to its first byte. Times are in milliseconds."""

    engine: str
    mode: str
    reason: str
    prompt_tokens: int
    matched_tokens: int  # as the rule counted them: what lies lower counts for less
    hbm_tokens: int
    host_tokens: int
    disk_tokens: int
    object_tokens: int
    peer_tokens: int  # that another engine holds beyond these
    queued_tokens: int
    attempts: int
    predicted_ttft_ms: float
    actual_ttft_ms: float  # of the engine that answered
    total_ttft_ms: float  # with the attempts before it, and what another engine computed for it
    prefill_engine: str  # that computed the prompt; empty: the same
    prefill_reason: str  # what came of asking another one, or why none was asked; empty: this engine takes no prompts

    def header(self) -> bytes:
        return b"x-dynamo-route: %b\r\n" % orjson.dumps(self)


def receipt_of(
    placement: Placement, state: RoutingState, attempts: int, spent: tuple[float, float], prefilled: tuple[str, str]
) -> Receipt:
    """The receipt for a first byte; `spent` seconds since the last attempt began, and since the request came;
    `prefilled`: who computed the prompt for its engine, and why, or why nobody did.
    """
    model, (seconds, total_seconds) = state.learner.model, spent
    decision, prompt = placement.decision, placement.prompt_tokens
    new = decision.new_tokens
    own = model.t_p * new + model.t_a * new * (prompt - new / 2)
    predicted = model.t_0 + model.t_p * placement.queued_tokens + own
    return Receipt(
        engine=placement.engine.name,
        mode=state.mode,
        reason=decision.reason,
        prompt_tokens=prompt,
        matched_tokens=decision.matched_tokens,
        **{f"{name}_tokens": placement.tiers.get(name, 0) for name in TIER_NAMES},
        peer_tokens=placement.peer_tokens,
        queued_tokens=placement.queued_tokens,
        attempts=attempts,
        predicted_ttft_ms=round(predicted * 1e3, 3),
        actual_ttft_ms=round(seconds * 1e3, 3),
        total_ttft_ms=round(total_seconds * 1e3, 3),
        prefill_engine=prefilled[0],
        prefill_reason=prefilled[1],
    )
