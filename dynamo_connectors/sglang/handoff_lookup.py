"""Asks the prefill engines that requests name what they are, and hardly keeps SGLang's scheduler waiting for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import requests

from dynamo_connectors.errors import StoreError

logger = logging.getLogger(__name__)

#: How long the scheduler may wait for an answer, once in `_EVERY_SECONDS`: most come at once.
_PATIENCE_SECONDS = 0.2
_EVERY_SECONDS = 1.0
#: Addresses that are remembered: clients make them up, and may not come back for them.
_MOST_NAMED = 1000


class Lookups:
    """Called by the scheduler's thread only. `look_up` runs on threads, and raises what is wrong with an address."""

    def __init__(self, look_up: Callable[[str], None]) -> None:
        self._look_up = look_up
        self._running: dict[str, Future[None]] = {}
        #: Those that the log names already.
        self._complained: set[str] = set()
        self._patient_at = 0.0

    def attempt(self, address: str) -> None:
        """Starts a look-up, or sees how one that runs has ended."""
        lookup = self._running.get(address)
        if lookup is None:
            if len(self._running) >= _MOST_NAMED:
                self._running = {other: running for other, running in self._running.items() if not running.done()}
            lookup = self._running[address] = Future()
            thread = threading.Thread(target=self._run, args=(address, lookup), name="kvbm-bootstrap", daemon=True)
            thread.start()
        patience, now = 0.0, time.monotonic()
        if now >= self._patient_at:
            patience, self._patient_at = _PATIENCE_SECONDS, now + _EVERY_SECONDS
        try:
            lookup.result(patience)
        except TimeoutError:
            return
        except Exception as error:  # noqa: BLE001 - whatever it was, these requests alone have failed
            if address not in self._complained:
                logger.warning("dynamo: prefill engine %s cannot be used: %s", address, error)
            if len(self._complained) >= _MOST_NAMED:
                self._complained.clear()
            self._complained.add(address)
        else:
            self._complained.discard(address)
        del self._running[address]

    def _run(self, address: str, outcome: Future[None]) -> None:
        try:
            self._look_up(address)
            outcome.set_result(None)
        except Exception as error:  # noqa: BLE001 - told to who waits for it
            outcome.set_exception(error)


def ask(url: str, question: dict[str, int]) -> dict[str, Any]:
    """What a bootstrap server answers."""
    response = requests.get(url, params=question, timeout=5)
    if response.status_code != 200:
        raise StoreError("unreachable", f"its bootstrap server answered {response.status_code}")
    answer: dict[str, Any] = response.json()
    return answer
