"""`--workers N`: N proxy processes on one port (SO_REUSEPORT), watched, restarted, stopped together.

The supervisor relays nothing. It holds the port, serves the admin listener for all workers and starts a worker again
that died. A worker learns its configuration from its standard input and ends when that ends.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import secrets
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

from .config import EngineAddress, ProxyConfig, Replicas, of_workers, parse_engine_url
from .errors import ListenError
from .listening import banner_host, listen_error
from .workers_admin import WorkersAdmin

_READY = b"ready\n"
_RESTART_SECONDS = 1.0
_KILL_SECONDS = 10.0  # beyond the drain time
log = logging.getLogger("dynamo_proxy")


class Worker:
    """One place for a worker process: it is filled again when its process dies."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.admin_socket = str(folder / f"worker-{number}.sock")
        self.process: asyncio.subprocess.Process | None = None
        self.ready = asyncio.Event()
        self.was_ready = False

    @property
    def is_up(self) -> bool:
        return self.ready.is_set() and self.process is not None and self.process.returncode is None

    async def run(self, config: ProxyConfig) -> int:
        """Start a process, and wait for its end. Returns its exit code."""
        self.process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dynamo_proxy.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the supervisor to pass on
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            said = pickle.dumps(config)
            process.stdin.write(len(said).to_bytes(8, "big") + said)
            if await process.stdout.readline() == _READY:
                self.was_ready = True
                self.ready.set()
            return await process.wait()
        finally:
            self.ready.clear()
            process.stdin.close()

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)


class Supervisor:
    """The workers and what they share."""

    def __init__(self, config: ProxyConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self.workers = [Worker(number, folder) for number in range(config.workers)]
        # Where each tells of its load; over the network, if other proxies are to hear of it.
        if config.replicas is not None:
            self._places = of_workers(config.replicas, config.workers)
        else:
            key, near = secrets.token_bytes(32), [f"unix:{folder / f'replica-{w.number}.sock'}" for w in self.workers]
            self._places = [Replicas(place, tuple(p for p in near if p != place), key) for place in near]
        self.admin = WorkersAdmin(lambda: [worker.admin_socket for worker in self.workers if worker.is_up])
        self.port = 0
        self.admin_port = 0
        self._stopping = False
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, held: socket.socket) -> None:
        """Start the workers on the port that `held` holds. Raises ListenError."""
        self.port = held.getsockname()[1]
        await self._start_admin()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep(worker)) for worker in self.workers]
        ready = asyncio.gather(*(worker.ready.wait() for worker in self.workers))
        waiting: list[asyncio.Future[Any]] = [ready, *self._tasks]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if ready not in done:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)
            raise ListenError("a worker did not start; its own line above says why")

    async def _start_admin(self) -> None:
        self._runner = web.AppRunner(self.admin.application(), access_log=None)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._folder / "supervisor.sock")).start()
        if self._config.admin_port is None:
            return
        host = self._config.admin_host
        try:
            await web.TCPSite(self._runner, host, self._config.admin_port).start()
        except OSError as error:
            raise listen_error("--admin-port", host, self._config.admin_port, error) from None
        self.admin_port = self._runner.addresses[-1][1]

    async def _keep(self, worker: Worker) -> None:
        """Run a worker again and again until all stop. A worker that never was ready ends this."""
        engines: tuple[EngineAddress, ...] = self._config.engines
        while not self._stopping:
            code = await worker.run(self._config_of(worker, engines))
            if self._stopping or not worker.was_ready:
                return
            log.warning("worker %d ended with code %d; starting it again", worker.number, code)
            await asyncio.sleep(_RESTART_SECONDS)
            engines = await self._engines_now() or engines

    async def _engines_now(self) -> tuple[EngineAddress, ...]:
        """What the other workers know, also from sources that say nothing just now."""
        known = {address: address for address in self._config.engines}
        engines = []
        for row in await self.admin.engines():
            address = parse_engine_url(row["url"])
            address = known.get(address, address)
            told = {**row["deadlines"], "role": row["role"], "discovered": row["discovered"]}
            options = replace(address.options, **told, draining=row["state"] == "draining")
            engines.append(replace(address, options=options))
        return tuple(engines)

    def _config_of(self, worker: Worker, engines: tuple[EngineAddress, ...]) -> ProxyConfig:
        return replace(
            self._config,
            engines=engines,
            port=self.port,
            admin_port=None,
            admin_socket=worker.admin_socket,
            supervisor_socket=str(self._folder / "supervisor.sock"),
            replicas=self._places[worker.number],
        )

    async def stop(self, signals: asyncio.Queue[int]) -> None:
        """Pass a signal on and wait for the workers; a second one goes to them too."""
        self._stopping = True
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        ended = asyncio.gather(*self._tasks)
        again = asyncio.ensure_future(signals.get())
        limit = self._config.timeouts.drain_seconds + _KILL_SECONDS
        await asyncio.wait((ended, again), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        if not ended.done():
            for worker in self.workers:
                worker.signal(signal.SIGTERM)
            await asyncio.wait((ended,), timeout=_KILL_SECONDS)

    async def close(self) -> None:
        self._stopping = True
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()

    def check(self) -> None:
        assert len({worker.admin_socket for worker in self.workers}) == len(self.workers), "workers share a socket"


async def supervise(config: ProxyConfig) -> None:
    """Run until SIGTERM or SIGINT, then let the workers drain. Raises ListenError."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-proxy-")))
        held = stack.enter_context(hold_port(config.host, config.port))
        supervisor = Supervisor(config, folder)
        try:
            await supervisor.start(held)
            admin = f", admin http://{config.admin_host}:{supervisor.admin_port}" if supervisor.admin_port else ""
            scheme = "https" if config.tls.cert_file else "http"
            where = f"{scheme}://{banner_host(config.host)}:{supervisor.port}{admin}"
            log.info("listening on %s (%d workers, mode %s)", where, config.workers, config.router_mode)
            await signals.get()
            log.info("stopping %d workers", config.workers)
            await supervisor.stop(signals)
        finally:
            await supervisor.close()


def hold_port(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen: the port is the workers', and nobody else's. Raises ListenError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        held = socket.socket(family, kind, protocol)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Connections that a proxy without workers closed here stay for a minute, and shall not be in the way.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
        except OSError:
            held.close()
            raise
    except OSError as error:
        raise listen_error("--port", host, port, error) from None
    return held
