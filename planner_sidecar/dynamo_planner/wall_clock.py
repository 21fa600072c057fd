"""The time of day, as seconds and as the text that Kubernetes and logs want."""

from __future__ import annotations

import time
from datetime import datetime, timezone


class WallClock:
    """The machine's clock; tests put their own in its place."""

    def seconds(self) -> float:
        return time.time()

    def stamp(self) -> str:
        """RFC 3339 with microseconds: what a Lease's renewTime must look like."""
        return datetime.fromtimestamp(self.seconds(), timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
