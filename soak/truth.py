"""What every block must hold: the KV rows of an engine that nothing has happened to, and who compares them.

In float32 a block's KV is the same whoever computes it, up to rounding, so wrong bytes are seen in the block itself, at
once, and not only where they turn a token. Inside the engine `watch/sitecustomize.py` compares each block that is
stored or loaded; from outside, `compare_slabs` compares what a killed engine left on its disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers import slab_format, slot_header

#: For `watch/sitecustomize.py`: where the rows are, and where it writes down what differs.
ROWS_VARIABLE, FAULTS_VARIABLE = "DYNAMO_SOAK_ROWS", "DYNAMO_SOAK_FAULTS"
#: How the lines of copies end that were right, and of those that nobody can judge: blocks of no prompt of ours.
RIGHT, UNKNOWN = ": right", ": unknown"
WATCH_FOLDER = Path(__file__).parent / "watch"
#: Rounding moves a float of this model's KV by 1e-6.
_SAME = 1e-4

Rows = dict[bytes, npt.NDArray[np.float32]]


def proven_rows(slab: Path) -> Iterator[tuple[bytes, npt.NDArray[np.float32]]]:
    """(key, row) of every slot of `slab` that its header proves."""
    with slab.open("rb") as file:
        try:
            block = slab_format.decode_superblock(file.read(slab_format.PAGE_BYTES))
        except StoreError:
            return  # forgotten: nobody will read it
        owner = slab_format.owner_of(block.namespace, block.generation)
        for slot in range(block.capacity_blocks):
            file.seek(slab_format.PAGE_BYTES + slot * block.slot_bytes)
            whole = file.read(block.slot_bytes)
            if len(whole) < block.slot_bytes:
                return  # it was cut, and nobody has made it whole since
            header = whole[: slot_header.HEADER_BYTES]
            key = BlockKey(header[56 : 56 + int.from_bytes(header[12:16], "little")])  # docs/on-disk-format.md
            row = memoryview(whole)[slot_header.HEADER_BYTES : slot_header.HEADER_BYTES + block.row_bytes]
            try:
                slot_header.verify(header, owner, key, row)
            except StoreError:
                continue
            yield key, np.frombuffer(row, dtype=np.float32)


def read_rows(folder: Path) -> Rows:
    """The proven rows of all slabs in `folder`."""
    return {key: row for slab in folder.glob("*.slab") for key, row in proven_rows(slab)}


def save_rows(rows: Rows, path: Path) -> None:
    np.savez(path, **{key.hex(): row for key, row in rows.items()})  # type: ignore[arg-type]


def load_rows(path: Path) -> Rows:
    with np.load(path) as archive:
        return {bytes.fromhex(name): archive[name] for name in archive.files}


def difference(rows: Rows, key: bytes, row: npt.NDArray[np.float32]) -> str | None:
    """How `row` differs from what block `key` must hold, or None. Of a block of no prompt of ours nobody knows."""
    right = rows.get(key)
    if right is None:
        return None
    wrong = np.flatnonzero(~(np.abs(right - row) < _SAME))
    if not len(wrong):
        return None
    return f"block {key.hex()[:16]}: {len(wrong)} of {len(row)} floats differ, the first at {wrong[0]}"


def compare_slabs(rows: Rows, folder: Path) -> list[str]:
    """One line for each proven row on disk that is not what it must be."""
    found = [(slab, difference(rows, key, row)) for slab in folder.glob("*.slab") for key, row in proven_rows(slab)]
    return [f"{slab.name}: {line}" for slab, line in found if line is not None]


def watch_variables(rows: Path, faults: Path) -> dict[str, str]:
    """The environment in which an engine watches its own blocks."""
    path = os.pathsep.join([str(WATCH_FOLDER), str(WATCH_FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
    return {ROWS_VARIABLE: str(rows), FAULTS_VARIABLE: str(faults), "PYTHONPATH": path.rstrip(os.pathsep)}
