"""Scales by running the operator's own command (Slurm, docker, a script): `{replicas}` is the count wanted, `{victims}`
the comma-separated URLs of the engines that were drained and may be stopped. No shell runs.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping, Sequence

from .actuator import NOTHING_MORE, Happening, Outcome, Supplement
from .drain import choose_victim
from .errors import ActuationError, ObservationError
from .records import READY
from .replica import Surroundings
from .stop_in_hand import StopInHand

_TAIL_BYTES = 200


class HookActuator:
    """One command at a time. The engines it starts come into sight through the proxy or as named engines."""

    mode = "actuate"

    def __init__(self, command: str, timeout_seconds: float, around: Surroundings) -> None:
        self._command = command
        self._timeout_seconds = timeout_seconds
        self._around = around
        self._wanted = 0
        self._stop = StopInHand(self, around)

    def states(self) -> Mapping[str, str]:
        return {}

    async def refresh(self) -> Supplement:
        return NOTHING_MORE

    async def apply(self, current: int, desired: int, by_hand: bool) -> Outcome:
        return await self._stop.attempt(self._more(desired) if desired > current else self._fewer(current, desired))

    async def restart(self) -> Outcome:
        return Outcome(False, "not_offered", ("a scale command knows counts only; restart by your own means",))

    def happenings(self) -> list[Happening]:
        return self._stop.take()

    async def close(self) -> None:
        """What runs, runs on; a drain that has not come to its order is taken back."""
        await self._stop.close()

    def kill_now(self) -> None:
        self._stop.cancel()

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self._stop.check()

    async def mark(self, urls: Sequence[str]) -> None:
        return None

    async def unmark(self, urls: Sequence[str]) -> None:
        return None

    async def stop(self, urls: Sequence[str]) -> None:
        await self._run(self._wanted, urls)

    async def left(self, urls: Sequence[str]) -> tuple[frozenset[str], bool]:
        living = [url for url in urls if await self._answers(url)]
        return frozenset(living), False

    async def _more(self, desired: int) -> Outcome:
        kept = self._stop.take_back()
        return kept or Outcome(True, "scaled", (await self._run(desired, ()),))

    async def _fewer(self, current: int, desired: int) -> Outcome:
        if self._stop.is_running:
            return Outcome(False, "draining", ("an earlier drain is still under way",))
        self._wanted = desired
        urls = await self._victims(current - desired)
        self._stop.begin(urls)
        return Outcome(True, "draining", (f"draining {', '.join(urls) or 'nothing'}, then running the command",))

    async def _victims(self, count: int) -> tuple[str, ...]:
        """Those with least in flight that the proxy lists; without a proxy the command chooses for itself."""
        if self._around.proxy is None:
            return ()
        try:
            listing = await self._around.proxy.engines()
        except ObservationError as error:
            raise ActuationError(error.reason, f"no victim can be chosen: {error}") from error
        left = {engine.url: engine.in_flight for engine in listing.engines if engine.state == READY}
        chosen: list[str] = []
        while len(chosen) < count:
            url = choose_victim((url, busy, 0.0) for url, busy in left.items() if url not in chosen)
            if url is None:
                break
            chosen.append(url)
        return tuple(chosen)

    async def _run(self, replicas: int, victims: Sequence[str]) -> str:
        """Run the command to its end. Raises ActuationError if it cannot start, fails or takes too long."""
        filled = {"{replicas}": str(replicas), "{victims}": ",".join(victims)}
        words = shlex.split(self._command)
        for place, value in filled.items():
            words = [word.replace(place, value) for word in words]
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as error:
            raise ActuationError("cannot_start", f"cannot run {words[0]!r}: {error.strerror or error}") from error
        try:
            output, _ = await asyncio.wait_for(process.communicate(), self._timeout_seconds)
        except (asyncio.TimeoutError, TimeoutError) as error:
            text = f"{words[0]!r} took more than {self._timeout_seconds:g} s and was killed"
            raise ActuationError("command_timeout", text) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        said = output[-_TAIL_BYTES:].decode(errors="replace").strip().replace("\n", " ")
        if process.returncode:
            raise ActuationError("command_failed", f"{words[0]!r} exited with code {process.returncode}: {said}")
        return f"ran {words[0]!r} for {replicas} replicas"

    async def _answers(self, url: str) -> bool:
        try:
            await self._around.peers.scrape(url)
        except ObservationError as error:
            return error.reason not in ("unreachable",)
        return True
