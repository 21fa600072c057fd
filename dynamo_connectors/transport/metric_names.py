"""What the transport counts, as it is called on every engine's /metrics. Pure."""

from __future__ import annotations

#: Count -> (metric name, label, help).
NIXL_COUNTERS: dict[str, tuple[str, str | None, str]] = {
    "nixl_read_bytes": ("dynamo_nixl_read_bytes", None, "Bytes of peers that were read and proven."),
    "nixl_read_blocks": ("dynamo_nixl_read_blocks", None, "Blocks of peers that were read and proven."),
    "nixl_transferred_bytes": ("dynamo_nixl_transferred_bytes", None, "Bytes that NIXL has read, proven or not."),
    "nixl_descriptors": ("dynamo_nixl_descriptors", None, "Pieces of memory in READs, as NIXL tells it."),
    "nixl_post_microseconds": ("dynamo_nixl_post_seconds", None, "Time NIXL took to start READs, as it tells it."),
    "nixl_transfer_microseconds": ("dynamo_nixl_transfer_seconds", None, "Time READs took, as NIXL tells it."),
    "nixl_window_blocks": ("dynamo_nixl_window_blocks", None, "Blocks of these that went from HBM to HBM."),
    "nixl_windows_off": (
        "dynamo_nixl_windows_off",
        None,
        "Times that a worker started without rows in HBM for peers, which it should have.",
    ),
    "nixl_reads": ("dynamo_nixl_reads", None, "READs of peers that ended, well or badly."),
    "nixl_late_reads": ("dynamo_nixl_late_reads", None, "READs that were not over at their deadline."),
    "nixl_fences_refused": ("dynamo_nixl_fences_refused", "reason", "READs whose bytes were not what was granted."),
    "nixl_leases_ended": ("dynamo_nixl_leases_ended", "reason", "Leases of this engine's blocks that ended."),
    "nixl_refused_peers": ("dynamo_nixl_refused_peers", "reason", "Handshakes that were refused."),
    "nixl_refused_messages": ("dynamo_nixl_refused_messages", "reason", "Messages that were hostile, old or garbled."),
    "nixl_silent_peers": ("dynamo_nixl_silent_peers", None, "Times that a peer answered no more."),
    "nixl_stalls": ("dynamo_nixl_stalls", None, "Times that reads were given up under a call of NIXL that hung."),
    "nixl_restarts": ("dynamo_nixl_restarts", None, "Times the NIXL agent was made anew to fence late READs."),
}
#: What stands at a level on a worker -> (metric name, help). Summed over workers.
NIXL_LEVELS = {
    "nixl_open_leases": ("dynamo_nixl_open_leases", "Leases that peers hold on this engine's blocks."),
    "nixl_quarantined_bytes": (
        "dynamo_nixl_quarantined_bytes",
        "Host memory and HBM that late READs may still write to.",
    ),
}


def in_base_units(what: str, amount: float) -> float:
    """Counts are whole numbers, so seconds are counted in millionths."""
    return amount / 1e6 if what.endswith("_microseconds") else amount
