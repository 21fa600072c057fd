"""Which weights a model has, as far as its files tell: KV computed with other weights must never be read.

A folder is named by its files' names, sizes and times of change; a folder inside a hub cache by its commit, which says
the same on every machine. Weights that cannot be seen (streamed from elsewhere) get a name nobody else will ever have.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from pathlib import Path

#: The weights, and the configuration that says how they are used.
_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.json")
_COMMIT = re.compile(r"snapshots/([0-9a-f]{40})(/|$)")


def weights_identity(place: Path | None, load_format: str, seed: int) -> str:
    """A name that differs whenever the weights may differ. `place` is the model's folder or file, if there is one.

    Dummy weights come from the seed; their shape from the configuration in the folder.
    """
    files = _identity_of_files(place) if place is not None else None
    if files is None:
        return f"unseen:{uuid.uuid4().hex}"
    return f"{load_format}:{seed if load_format == 'dummy' else ''}:{files}"


def _identity_of_files(place: Path) -> str | None:
    commit = _COMMIT.search(place.as_posix())
    if commit is not None:
        return f"commit:{commit[1]}"
    found = [place] if place.is_file() else [path for pattern in _PATTERNS for path in place.glob(pattern)]
    if not found:
        return None
    stats = [(path.name, path.stat()) for path in sorted(set(found))]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return f"files:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
