"""What the reason of a failure says about the bytes: whether a block is lost, and whether a write left some. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_connectors.blocks import BlockKey

#: The store did not answer, or would not, or the transfer itself went wrong ("internal_error": a whole batch fails with
#: one fault of ours). The bytes may be fine, and a request that was let down once computes, so what fails each time
#: costs each request one try. Everything else is told by the bytes themselves: such a block is never served again.
_PASSING = frozenset(
    {
        "bad_answer",
        "closed",
        "deadline",
        "forbidden",
        "forgotten",
        "internal_error",
        "no_bucket",
        "not_whole",
        "tier_off",
        "timeout",
        "unavailable",
        "unreachable",
        "upload_backlog",
        "write_failed",
    }
)


#: A write that failed so has put nothing into an object store.
_NOT_SENT = frozenset(
    {"closed", "forbidden", "forgotten", "no_bucket", "no_tier", "not_whole", "tier_off", "upload_backlog", "wrong_key"}
)


def may_have_been_sent(reason: str) -> bool:
    return reason not in _NOT_SENT


def is_damage(reason: str) -> bool:
    return reason not in _PASSING


def damaged(failed: Mapping[BlockKey, str]) -> set[BlockKey]:
    return {key for key, reason in failed.items() if is_damage(reason)}
