"""Wakes a thread that polls sockets."""

from __future__ import annotations

import os
import threading


class Bell:
    def __init__(self) -> None:
        #: For the poller of the thread to wake.
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        #: Guards the descriptor: closed, its number is somebody else's.
        self._lock = threading.Lock()
        self._is_open = True

    def ring(self) -> None:
        """From any thread."""
        with self._lock:
            if self._is_open:
                os.eventfd_write(self.fd, 1)

    def hush(self) -> None:
        """On the thread that it woke."""
        os.eventfd_read(self.fd)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                os.close(self.fd)
