"""What the reason of a failure says about the bytes: whether a block is lost, or only not to be had now. Pure."""

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
        "no_credentials",
        "not_whole",
        "tier_off",
        "timeout",
        "unavailable",
        "unreachable",
        "upload_backlog",
        "write_failed",
    }
)


def is_damage(reason: str) -> bool:
    return reason not in _PASSING


def damaged(failed: Mapping[BlockKey, str]) -> set[BlockKey]:
    return {key for key, reason in failed.items() if is_damage(reason)}


def add_failures(failed: dict[BlockKey, str], more: Mapping[BlockKey, str]) -> None:
    """Joins what two workers say of one job: a block that is damaged on one of them is damaged."""
    for key, reason in more.items():
        if is_damage(reason) or not is_damage(failed.get(key, reason)):
            failed[key] = reason
