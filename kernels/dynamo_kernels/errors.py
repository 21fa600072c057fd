"""What the block copy refuses, and what the driver may answer."""

from __future__ import annotations


class CopyError(ValueError):
    """The copy would touch bytes outside the views, or bytes of different shape. Nothing was copied."""


class DriverError(RuntimeError):
    """The CUDA driver refused a copy, or does not offer the call. Nobody knows which bytes were copied."""
