"""The bucket of the object_store tier: whether it answers, to these credentials, and lets us list, write and read."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

from dynamo_connectors.doctor.finding import Finding, Level
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.tiers.object_client import ObjectClient

NAME = "object_store"
DEADLINE_SECONDS = 10.0
BODY = b"dynamo"
RIGHTS = "give these credentials ListBucket, GetObject, PutObject and DeleteObject under the prefix"
REMEDIES = {
    "forbidden": f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use the machine's role; {RIGHTS}",
    "no_credentials": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles in ~/.aws are not read), or give this "
    "machine an instance role",
    "no_bucket": "create the bucket, or name another --kvbm-object-url",
    "timeout": "without AWS_ACCESS_KEY_ID the machine's role is asked, which may hang; else check endpoint and network",
}
ELSE = "check --kvbm-object-endpoint-url, AWS_REGION and the network"


def examine_object_store(url: str | None, endpoint_url: str | None) -> list[Finding]:
    """Leaves nothing in the bucket, unless it may write there and not delete."""
    if url is None:
        return []
    try:
        client = ObjectClient(url, endpoint_url, "doctor")
    except ConfigError as error:
        return [Finding(Level.FAIL, NAME, str(error), "docs/object-store.md says what the tier needs")]
    try:
        return [asyncio.run(_try(client))]
    finally:
        client.close()


async def _try(client: ObjectClient) -> Finding:
    name = f"probe-{secrets.token_hex(8)}"
    failure = await _failure(lambda: client.page(None))
    if failure is not None:
        return Finding(Level.FAIL, NAME, str(failure), REMEDIES.get(failure.reason, ELSE))
    steps: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: client.put(name, bytearray(BODY)),
        lambda: client.get(name, 0, len(BODY)),
        lambda: client.delete([name]),
    )
    for step in steps:
        failure = await _failure(step)
        if failure is not None and failure.reason == "forbidden":
            return Finding(Level.WARN, NAME, f"it serves, and cannot store or erase: {failure}", RIGHTS)
        if failure is not None:
            return Finding(Level.FAIL, NAME, str(failure), REMEDIES.get(failure.reason, ELSE))
    return Finding(Level.OK, NAME, f"{client.name}: listed, written, read and erased")


async def _failure(ask: Callable[[], Awaitable[object]]) -> StoreError | None:
    try:
        await asyncio.wait_for(ask(), DEADLINE_SECONDS)
    except StoreError as error:
        return error
    except asyncio.TimeoutError:
        return StoreError("timeout", f"no answer in {DEADLINE_SECONDS:g} s")
    return None
