"""Importable stand-in for torchaudio; nothing in it works."""

from __future__ import annotations

import importlib
from typing import Any

from placeholders import stand_in_below

__version__ = "2.11.0"
__path__: list[str] = []
stand_in_below(__name__)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
