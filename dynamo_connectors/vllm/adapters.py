"""Where the weights of models and adapters lie, and which adapter it is that a request uses.

vLLM's block hashes name an adapter by name and path, and one that is trained anew keeps both; what an earlier process,
or another replica, kept under them must not be taken for its KV.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dynamo_connectors.weights import weights_identity

_NAME_BYTES = 8


def place_of(name: str, revision: str | None = None, file: str = "config.json") -> Path | None:
    """The folder or file on this machine of what is named by a path, or by a name on the hub; None if there is none.

    `file` is in every download of its kind.
    """
    place = Path(name)
    if place.exists():
        return place
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # no name of the hub: a service's URL, for example
        return None
    return Path(found).parent if isinstance(found, str) else None


class Adapters:
    """Names the adapters of this process by their files, each as its first request found them: it is loaded then."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, str], bytes] = {}

    def name_of(self, request: Any) -> bytes:
        """Of the adapter that `request` uses; empty for the model itself."""
        adapter = getattr(request, "lora_request", None)
        if adapter is None:
            return b""
        loaded = (adapter.lora_int_id, adapter.lora_path)
        if loaded not in self._names:
            files = weights_identity(place_of(adapter.lora_path, file="adapter_config.json"), "lora", 0)
            self._names[loaded] = hashlib.blake2b(files.encode(), digest_size=_NAME_BYTES).digest()
        return self._names[loaded]

    def check(self) -> None:
        assert all(len(name) == _NAME_BYTES for name in self._names.values()), "an adapter has no name"
