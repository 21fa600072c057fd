"""Which weights a model has, as far as its files tell: KV computed with other weights must never be read.

A folder is named by its files: names, sizes, times of change and samples of their bytes, because an image or a copy may
give all files one time, and fine-tuned weights keep their size. A folder inside a hub cache is named by its commit, the
same on every machine. Weights that cannot be seen (streamed from elsewhere) get a name that nobody else will ever have.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from pathlib import Path

#: The weights, and the configuration that says how they are used.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_CONFIGURATION = "*.json"
_COMMIT = re.compile(r"snapshots/([0-9a-f]{40})(/|$)")
#: Of each file, spread over it.
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def weights_identity(place: Path | None, load_format: str, seed: int) -> str:
    """A name that differs whenever the weights may differ. `place` is the model's folder or file, if there is one.

    Dummy weights come from the seed; their shape from the configuration in the folder.
    """
    is_dummy = load_format == "dummy"
    files = _identity_of_files(place, is_dummy) if place is not None else None
    if files is None:
        return f"unseen:{uuid.uuid4().hex}"
    return f"{load_format}:{seed if is_dummy else ''}:{files}"


def _identity_of_files(place: Path, is_dummy: bool) -> str | None:
    commit = _COMMIT.search(place.as_posix())
    if commit is not None:
        return f"commit:{commit[1]}"
    weights = [place] if place.is_file() else [path for pattern in _WEIGHTS for path in place.glob(pattern)]
    found = {*weights, *place.glob(_CONFIGURATION)}
    # A configuration alone says nothing about weights that come from elsewhere.
    if not (found if is_dummy else weights):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(found):
        status = path.stat()
        digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
        _add_samples(digest, path, status.st_size)
    return f"files:{digest.hexdigest()}"


def _add_samples(digest: hashlib.blake2b, path: Path, size: int) -> None:
    with path.open("rb", buffering=0) as file:
        for sample in range(_SAMPLES):
            file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
