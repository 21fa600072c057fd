"""What failing flash does to a slab under its engine."""

from __future__ import annotations

from pathlib import Path

from dynamo_connectors.tiers.nvme import slot_bytes, slot_offset
from dynamo_connectors.tiers.slot_header import HEADER_BYTES


def damage_every_payload(slab: Path, row_bytes: int) -> None:
    """One flipped bit in the payload of every slot."""
    first, step = slot_offset(0, row_bytes) + HEADER_BYTES + 777, slot_bytes(row_bytes)
    with slab.open("r+b") as file:
        for offset in range(first, slab.stat().st_size, step):
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x40]))
