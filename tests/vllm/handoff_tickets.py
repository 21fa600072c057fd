"""Tickets that are changed on their way and signed again, as the engine would have signed them."""

from __future__ import annotations

from typing import Any

from dynamo_connectors.transport.tickets import Ticket
from dynamo_connectors.vllm.handoff import SIGNATURE

#: Of engines that were given none.
SECRET = b"this host alone"


def signed(params: dict[str, Any]) -> dict[str, Any]:
    lease, workers = bytes.fromhex(params["dynamo_lease"]), params["tp_size"]
    ticket = Ticket(params["remote_host"], params["remote_port"], lease, workers)
    return {**params, SIGNATURE: ticket.signature(SECRET, params["remote_num_tokens"]).hex()}
