"""Prefill and decode apart, under vLLM's own `kv_transfer_params`: what the two schedulers tell each other.

The prefill side answers a request that asks for it (`do_remote_decode`) with a ticket; the proxy passes it verbatim to
the decode side (`do_remote_prefill`), which may load the blocks that it names. Blocks go by their keys, so a ticket
that comes with another prompt gives nothing.
"""

from __future__ import annotations

import hmac
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from dynamo_connectors.block_manager import BlockManager, Source
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import HOST_DRAM, PEER
from dynamo_connectors.errors import StoreError
from dynamo_connectors.peer_config import is_this_host
from dynamo_connectors.transport.messages import LEASE_BYTES, STANDING_LEASE
from dynamo_connectors.transport.tickets import Ticket
from dynamo_connectors.vllm.job_ledger import JobLedger, Running

#: Beside the engine's own names: the lease, in hexadecimal.
LEASE = "dynamo_lease"
#: `Ticket.signature`, in hexadecimal.
SIGNATURE = "dynamo_signature"
UNSIGNED = (
    "its ticket is not signed with this fleet's --kvbm-peer-secret-file, or by another version; it is computed here"
)
#: More would not be a prompt.
_MOST_TOKENS = 1 << 24
#: Leases may keep so much of host memory; of what is beyond it the peer gets less, and computes the rest.
_MOST_SHARE = 0.5


class Identity(NamedTuple):
    """Where the workers of this engine serve peers, in the words of `kv_transfer_params`."""

    engine_id: str
    host: str
    port: int
    num_workers: int
    #: What the fleet shares.
    secret: bytes


class Trust(NamedTuple):
    """Whom the decode side believes. `local_only`: there is no secret, so no other host is asked."""

    secret: bytes
    local_only: bool


class Offered(NamedTuple):
    """What a decode request brought with it: up to `tokens` of its prompt can be read with `ticket`."""

    tokens: int
    ticket: BlockKey
    #: Its owner keeps the blocks for it. Otherwise they lie there, or not.
    is_leased: bool = True


def offered(params: object, trust: Trust) -> tuple[Offered | None, str]:
    """What `kv_transfer_params` offer, and one line when they offer something that cannot be used.

    They come from whoever may send requests, so what no engine of the fleet has signed is not believed.
    """
    if not isinstance(params, Mapping) or not params.get("do_remote_prefill"):
        return None, ""
    lease, tokens = params.get(LEASE), params.get("remote_num_tokens")
    if not isinstance(lease, str):
        return None, "its KV lies at an engine without --kvbm-role prefill; it is computed here"
    if not is_token_count(tokens):
        return None, f"remote_num_tokens {tokens!r:.80} is no number of tokens; it is computed here"
    try:
        place = params.get("remote_host"), params.get("remote_port"), bytes.fromhex(lease), params.get("tp_size")
        ticket = Ticket(*place)  # type: ignore[arg-type]
        encoded = ticket.encode()
        if Ticket.decode(encoded).lease == STANDING_LEASE:
            raise ValueError("it names no lease")
    except (StoreError, ValueError, TypeError, OverflowError) as error:
        return None, f"its ticket cannot be used ({error}); it is computed here"
    signature = params.get(SIGNATURE)
    expected = ticket.signature(trust.secret, tokens).hex()
    if not isinstance(signature, str) or not hmac.compare_digest(signature.encode(errors="replace"), expected.encode()):
        return None, UNSIGNED
    if trust.local_only and not is_this_host(ticket.host):
        return None, f"its KV lies at {ticket.host}, and without --kvbm-peer-secret-file no other host is asked"
    return Offered(tokens, BlockKey(encoded)), ""


def is_token_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS


def wants_handoff(params: object) -> bool:
    """Whether another engine shall decode this request."""
    return isinstance(params, Mapping) and bool(params.get("do_remote_decode"))


class Exports:
    """The prefill side. A hand-off waits until its blocks have arrived in host memory, and is then a job."""

    def __init__(
        self, identity: Identity, manager: BlockManager, ledger: JobLedger, counts: Counter[tuple[str, str]]
    ) -> None:
        self._identity = identity
        self._manager = manager
        self._ledger = ledger
        self._counts = counts
        #: Lease -> the chain to export, and those of its blocks that may still be on their way.
        self._waiting: dict[bytes, tuple[Sequence[BlockKey], set[BlockKey]]] = {}
        #: Block -> in how many leases it is.
        self._leased: Counter[BlockKey] = Counter()

    def begin(self, chain: Sequence[BlockKey], storing: set[BlockKey], block_tokens: int) -> dict[str, Any]:
        """The answer for the proxy. `storing`: blocks of the chain that are being copied to host memory."""
        lease = os.urandom(LEASE_BYTES)
        self._ledger.announce(lease)
        self._waiting[lease] = chain, storing
        self._export_what_is_ready(lease)
        tokens = len(chain) * block_tokens
        _, host, port, workers, secret = self._identity
        signature = Ticket(host, port, lease, workers).signature(secret, tokens)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(len(chain)))],
            "remote_engine_id": self._identity.engine_id,
            "remote_request_id": lease.hex(),
            "remote_host": self._identity.host,
            "remote_port": self._identity.port,
            "tp_size": self._identity.num_workers,
            "remote_num_tokens": tokens,
            LEASE: lease.hex(),
            SIGNATURE: signature.hex(),
        }

    def stored(self, keys: set[BlockKey]) -> None:
        """These blocks are no longer on their way: they have arrived, or never will."""
        for lease, (_, storing) in list(self._waiting.items()):
            storing -= keys
            self._export_what_is_ready(lease)

    def end(self, job: Running) -> None:
        if job.exports:
            self._manager.release(job.exports)
            for source in job.exports:
                self._leased[source.key] -= 1
                if not self._leased[source.key]:
                    del self._leased[source.key]

    def check(self) -> None:
        assert all(storing for _, storing in self._waiting.values()), "a hand-off waits for nothing"
        assert len(self._leased) <= self._most_leased, "leases hold more than their share of host memory"

    def _export_what_is_ready(self, lease: bytes) -> None:
        chain, storing = self._waiting[lease]
        if storing:
            return
        del self._waiting[lease]
        sources = self._manager.lease(chain)
        cut = next((at for at, source in enumerate(sources) if source.tier != HOST_DRAM), len(sources))
        room = self._most_leased - len(self._leased)
        for at, source in enumerate(sources[:cut]):
            room -= source.key not in self._leased
            if room < 0:
                self._counts["nixl_unexported_blocks", ""] += cut - at
                cut = at
                break
        # Peers read host memory only, and what is leased cannot be evicted for this engine's own prompts.
        self._manager.release(sources[cut:])
        self._leased.update(source.key for source in sources[:cut])
        self._ledger.export(lease, tuple(sources[:cut]))

    @property
    def _most_leased(self) -> int:
        return max(1, int(self._manager.tiers[0].index.capacity_blocks * _MOST_SHARE))


class Reach:
    """The decode side: what a request can load, of the tiers here and of its ticket. One per request."""

    def __init__(self, manager: BlockManager, offer: Offered | None, block_tokens: int) -> None:
        self._manager = manager
        self._ticket = offer.ticket if offer is not None else None
        self._blocks = offer.tokens // block_tokens if offer is not None else 0

    def match(self, chain: Sequence[BlockKey], start: int) -> int:
        """Length of the run of `chain` from `start` on that can be loaded. Changes nothing."""
        here = self._manager.match(chain, start)
        end = start + here
        while end < min(self._blocks, len(chain)):
            end += max(1, self._manager.match(chain, end))
        return end - start

    def lease(self, chain: Sequence[BlockKey], start: int, count: int) -> list[Source]:
        """Like `BlockManager.lease`: blocks that lie in no tier here come from the peer."""
        sources: list[Source] = []
        while len(sources) < count:
            found = self._manager.lease(chain, start + len(sources), count - len(sources))
            sources += found
            at = start + len(sources)
            if len(sources) < count and not found:
                if self._ticket is None or at >= self._blocks:
                    break
                sources.append(Source(chain[at], PEER, 0, self._ticket))
        return sources
