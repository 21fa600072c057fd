"""What the block copy refuses."""

from __future__ import annotations


class CopyError(ValueError):
    """The copy would touch bytes outside the views, or bytes of different shape. Nothing was copied."""
