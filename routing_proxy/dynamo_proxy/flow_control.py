"""Back-pressure of one client connection: the only place that pauses or resumes a reader.

Two rules. The client writes slower than the engine speaks: the engine's reader pauses until the client's
buffer is below its low-water mark. The client pipelines faster than we answer: its reader pauses until we are
done.
"""

from __future__ import annotations

import asyncio


class FlowControl:
    """Pauses and resumes the two readers of a relayed request."""

    __slots__ = ("_client", "_client_held", "_upstream", "_was_paused", "_writing_paused", "resumes")

    def __init__(self, client: asyncio.Transport, high_water_bytes: int) -> None:
        self._client = client
        self._upstream: asyncio.Transport | None = None
        self._writing_paused = self._was_paused = False
        self._client_held = False
        self.resumes = 0  # how often the client made room again
        client.set_write_buffer_limits(high=high_water_bytes)

    @property
    def writing_paused(self) -> bool:
        return self._writing_paused

    def was_paused(self) -> bool:
        """True if the client did not take more at any moment since this was asked last."""
        was, self._was_paused = self._was_paused, self._writing_paused
        return was

    def attach(self, upstream: asyncio.Transport) -> None:
        """A response starts to come from `upstream`."""
        self._upstream = upstream
        if self._writing_paused:
            upstream.pause_reading()

    def detach(self) -> None:
        """The response is over; its connection must be left reading."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None and self._writing_paused and not upstream.is_closing():
            upstream.resume_reading()

    def pause_writing(self) -> None:
        """The client's write buffer went over the high-water mark."""
        self._writing_paused = self._was_paused = True
        if self._upstream is not None and not self._upstream.is_closing():
            self._upstream.pause_reading()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self.resumes += 1
        if self._upstream is not None and not self._upstream.is_closing():
            self._upstream.resume_reading()

    def hold_client(self, hold: bool) -> None:
        """Stop or restart reading from the client."""
        if hold == self._client_held or self._client.is_closing():
            return
        self._client_held = hold
        if hold:
            self._client.pause_reading()
        else:
            self._client.resume_reading()

    def check(self) -> None:
        upstream = self._upstream
        if upstream is not None and not upstream.is_closing():
            assert upstream.is_reading() != self._writing_paused, "the engine's reader and the client's buffer disagree"
