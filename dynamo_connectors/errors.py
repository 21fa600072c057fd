"""Our own error types, one leaf per party at fault. The text always carries the remedy."""

from __future__ import annotations


class DynamoConnectorsError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(DynamoConnectorsError, ValueError):
    """The user asked for something impossible; the text names the flag and what to do."""


class UnsupportedLayoutError(DynamoConnectorsError):
    """The engine's KV tensors cannot be copied as opaque bytes per (layer, block)."""


class StoreError(DynamoConnectorsError):
    """A tier could not keep or return a block's bytes. Always a miss, never wrong bytes.

    `reason` is a short word fit for a metric label.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class PluginError(DynamoConnectorsError):
    """The engine does not offer what the plugin needs; the text says what to install or change."""
