"""Classes of requests by when their first token is wanted. Clients name theirs in OpenAI's `service_tier`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .errors import ConfigError


class SloClass(NamedTuple):
    """What requests of one class want."""

    name: str
    ttft_seconds: float
    priority: int = 0  # in the queue; the smallest is served first


def parse_slo_classes(texts: Sequence[str]) -> dict[str, SloClass]:
    """NAME,ttft=SECONDS[,priority=N], by name. Raises ConfigError."""
    classes: dict[str, SloClass] = {}
    for text in texts:
        name, *settings = text.split(",")
        values = dict(setting.split("=", 1) for setting in settings if "=" in setting)
        try:
            found = SloClass(name.strip(), float(values.pop("ttft")), int(values.pop("priority", "0")))
        except (KeyError, ValueError):
            found = None
        if found is None or values or not found.name or not 0 < found.ttft_seconds <= 86_400:
            raise ConfigError(
                f"--slo-class {text!r} is not NAME,ttft=SECONDS[,priority=N]; for example priority,ttft=0.5,priority=-1"
            )
        if found.name in classes:
            raise ConfigError(f"--slo-class {found.name} is given twice; name each class once")
        classes[found.name] = found
    return classes
