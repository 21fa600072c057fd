"""Stopping replicas that some other controller runs, without a request lost: one group of victims at a time.

Rules. Mark the victims, so that they are the ones to go; stop the proxy sending; wait until nothing is in flight; take
them off the proxy's list; only then order the stop; then see them gone. Whatever fails before the order is undone, and
a victim that lives on although the order went out (another one went instead) is put back to work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .actuator import Happening
from .errors import ActuationError, ObservationError
from .replica import Surroundings


class Stopper(Protocol):
    """What a controller of replicas offers. Every method may raise ActuationError."""

    async def mark(self, urls: Sequence[str]) -> None:
        """Make sure that these are the ones that go."""

    async def unmark(self, urls: Sequence[str]) -> None:
        """Take the mark back."""

    async def stop(self, urls: Sequence[str]) -> None:
        """Order them gone. Raises ActuationError if they are not to go any more."""

    async def left(self, urls: Sequence[str]) -> tuple[frozenset[str], bool]:
        """(those that still live, whether the order is carried out as far as it ever will be)."""


@dataclass
class DrainedStop:
    """One group on its way out. `keep` may be set at any time before the stop is ordered."""

    urls: tuple[str, ...]
    stopper: Stopper
    around: Surroundings
    keep: bool = False
    is_ordered: bool = False

    def __post_init__(self) -> None:
        self._hand_offs = self.around.hand_offs()

    async def run(self) -> list[Happening]:
        """Do it all, and say what became of each victim."""
        try:
            reason = await self._empty_and_stop()
        except ActuationError as error:
            return await self._undo(error.reason, str(error))
        if reason:
            return await self._undo(reason, "")
        return await self._see_them_gone()

    async def _empty_and_stop(self) -> str:
        """The way to the order. Returns why it must be undone, or nothing."""
        await self.stopper.mark(self.urls)
        for url in self.urls:
            if not await self._ask("drain", url):
                return "drain_refused"
        end = self.around.clock() + self.around.limits.drain_seconds
        waiting = set(self.urls)
        while waiting:
            if self.keep:
                return "kept"
            waiting -= {url for url in waiting if await self._is_idle(url) and await self._ask("remove", url)}
            if waiting and self.around.clock() >= end:
                return "drain_timeout"
            if waiting:
                await self.around.sleep(self.around.limits.poll_seconds)
        if self.keep:
            return "kept"
        await self.stopper.stop(self.urls)
        self.is_ordered = True
        return ""

    async def _see_them_gone(self) -> list[Happening]:
        end = self.around.clock() + self.around.limits.terminate_seconds
        while True:
            try:
                living, is_final = await self.stopper.left(self.urls)
            except ActuationError:
                living, is_final = frozenset(self.urls), False
            if not living:
                return [Happening(url, "stopped", "", "drained and gone") for url in self.urls]
            if is_final or self.around.clock() >= end:
                break
            await self.around.sleep(self.around.limits.poll_seconds)
        gone = [Happening(url, "stopped", "", "drained and gone") for url in self.urls if url not in living]
        reason = "wrong_victim" if is_final else "stop_ignored"
        return gone + await self._undo(reason, "it lives on after the order; serving again", sorted(living))

    async def _undo(self, reason: str, text: str, urls: Sequence[str] | None = None) -> list[Happening]:
        back = self.urls if urls is None else tuple(urls)
        told = [] if reason == "kept" else [reason]
        end = self.around.clock() + self.around.limits.resume_seconds
        for url in back:
            while not (await self._ask("register", url) and await self._ask("resume", url)):
                if self.around.clock() >= end:
                    told.append("resume_failed")
                    break
                await self.around.sleep(self.around.limits.poll_seconds)
        try:
            await self.stopper.unmark(back)
        except ActuationError as error:
            told.append(error.reason)
        said = text or "the stop was undone and it serves on"
        return [Happening(url, "kept", ",".join(dict.fromkeys(told)), said) for url in back]

    async def _ask(self, what: str, url: str) -> bool:
        """Whether the proxy agreed; one that does not know the replica agrees to everything, and so does none."""
        proxy = self.around.proxy
        if proxy is None:
            return True
        calls: dict[str, Callable[[str], Awaitable[int]]] = {
            "drain": proxy.drain,
            "remove": proxy.remove,
            "register": proxy.register,
            "resume": proxy.resume,
        }
        try:
            status = await calls[what](url)
        except ObservationError:
            return False
        return 200 <= status < 300 or status == 404

    async def _is_idle(self, url: str) -> bool:
        """The proxy's count rules; a replica it does not list must say itself that it has nothing to do."""
        try:
            if self.around.proxy is not None:
                listed = (await self.around.proxy.engines()).find(url)
                if listed is not None:
                    return listed.in_flight == 0 and await self._hand_offs.are_over(url)
            reading = await self.around.peers.scrape(url)
        except ObservationError as error:
            # One that cannot be reached any more has nothing in flight that could be saved.
            return self.around.proxy is None and error.reason == "unreachable"
        return reading.running + reading.waiting == 0 and self._hand_offs.are_over_in(url, reading)
