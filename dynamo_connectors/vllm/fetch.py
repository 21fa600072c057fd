"""A prefix that another engine holds in its host memory: how an engine is named, and what a request may say of it.

Whoever routes requests asks an engine for its name once (`kvbm_tell_peer`) and gives it to the engines that requests go
to, with how much of the prompt lies there (`kvbm_peer`, `kvbm_peer_tokens`). Names pass through clients' hands, so each
engine has signed its own: no request leads an engine anywhere but to one of its fleet. How much lies there is a guess,
and a wrong one is a miss.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.peer_config import is_this_host
from dynamo_connectors.transport.messages import STANDING_LEASE
from dynamo_connectors.transport.tickets import Ticket
from dynamo_connectors.vllm.handoff import UNSIGNED, Identity, Offered, Trust, is_token_count, offered
from dynamo_connectors.vllm.hints import PEER, PEER_TOKENS, TELL_PEER


def name_of(identity: Identity) -> str:
    """What a request's `kvbm_peer` says to mean this engine."""
    ticket = Ticket(identity.host, identity.port, STANDING_LEASE)
    return f"{identity.host}:{identity.port}/{ticket.signature(identity.secret, 0).hex()}"


def wants_name(params: object) -> bool:
    return isinstance(params, Mapping) and params.get(TELL_PEER) is True


def what_peers_have(params: object, trust: Trust, own_name: str) -> tuple[Offered | None, str]:
    """What can be read for a request at another engine, and one line when what it says of that cannot be used.

    What was computed for this very request goes before what happens to lie somewhere.
    """
    offer, problem = offered(params, trust)
    return (offer, problem) if offer is not None or problem else _hinted(params, trust, own_name)


def _hinted(params: object, trust: Trust, own_name: str) -> tuple[Offered | None, str]:
    if not isinstance(params, Mapping) or PEER not in params:
        return None, ""
    name, tokens = params[PEER], params.get(PEER_TOKENS)
    if not isinstance(name, str):
        return None, f"{PEER} {name!r:.80} is no name of an engine; it is computed here"
    if not is_token_count(tokens):
        return None, f"{PEER_TOKENS} {tokens!r:.80} is no number of tokens; it is computed here"
    if name and name == own_name:
        return None, ""
    address, _, signature = name.rpartition("/")
    host, _, port = address.rpartition(":")
    try:
        ticket = Ticket(host, int(port[:5]), STANDING_LEASE)
        encoded = ticket.encode()
        Ticket.decode(encoded)
        if port != str(ticket.port):  # one spelling: an engine must know its own name
            raise ValueError(f"port {port:.10}")
    except (StoreError, ValueError) as error:
        return None, f"{PEER} {name!r:.80} is no name of an engine ({error!s:.80}); it is computed here"
    expected = ticket.signature(trust.secret, 0).hex()
    if not hmac.compare_digest(signature.encode(errors="replace"), expected.encode()):
        return None, UNSIGNED
    if trust.local_only and not is_this_host(ticket.host):
        return None, f"its KV lies at {ticket.host}, and without --kvbm-peer-secret-file no other host is asked"
    return Offered(tokens, BlockKey(encoded), is_leased=False), ""
