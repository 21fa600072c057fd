"""What breaks: each fault is one function over the living system, and leaves it able to go on."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from soak.object_store import MODES, BreakablePipe
from tools.server_process import ServerProcess, members_of


@dataclass
class System:
    """The engine, its disk and its object store. `outages` is odd while the engine is down."""

    engine: ServerProcess
    slabs: Path
    pipe: BreakablePipe
    stopping: threading.Event
    rng: random.Random
    #: Looks at what a killed engine left on its disk, before anything is done to it.
    inspect: Callable[[], None] = lambda: None
    outages: int = 0
    done: Counter[str] = field(default_factory=Counter)

    def restart(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """SIGKILL to every process of the engine, then the same command again."""
        self.outages += 1
        self.engine.kill()
        self.inspect()
        meanwhile()
        self.engine.start().wait_ready(600)
        self.outages += 1


def kill(system: System) -> None:
    system.restart()


def kill_and_tear_the_log(system: System) -> None:
    """What a power cut may leave: the index log ends anywhere."""

    def tear() -> None:
        for log in system.slabs.glob("*.log"):
            size = log.stat().st_size
            os.truncate(log, max(0, size - system.rng.randrange(1, 200)))

    system.restart(tear)


def kill_and_flip_the_log(system: System) -> None:
    def flip() -> None:
        for log in system.slabs.glob("*.log"):
            _flip(log, 3, system.rng)

    system.restart(flip)


def stop_and_continue(system: System) -> None:
    assert system.engine.process is not None
    processes = members_of(system.engine.process.pid)
    for process in processes:
        _kill(process, signal.SIGSTOP)
    system.stopping.wait(4)
    for process in processes:
        _kill(process, signal.SIGCONT)


def flip_bytes_on_disk(system: System) -> None:
    for slab in system.slabs.glob("*.slab"):
        _flip(slab, 300, system.rng)


def cut_the_slab(system: System) -> None:
    for slab in system.slabs.glob("*.slab"):
        os.truncate(slab, slab.stat().st_size // 2)


def reset_everything(system: System) -> None:
    request = urllib.request.Request(system.engine.url + "/reset_prefix_cache?reset_external=true", method="POST")
    urllib.request.urlopen(request, timeout=60).close()


def reset_hbm(system: System) -> None:
    request = urllib.request.Request(system.engine.url + "/reset_prefix_cache", method="POST")
    urllib.request.urlopen(request, timeout=60).close()


def break_the_object_store(system: System) -> None:
    system.pipe.mode = system.rng.choice([mode for mode in MODES if mode != "fine"])
    system.done[f"object store: {system.pipe.mode}"] += 1
    system.stopping.wait(15)
    system.pipe.mode = "fine"


FAULTS = {
    kill: 3,
    kill_and_tear_the_log: 2,
    kill_and_flip_the_log: 1,
    stop_and_continue: 3,
    flip_bytes_on_disk: 4,
    cut_the_slab: 1,
    reset_everything: 1,
    reset_hbm: 4,
    break_the_object_store: 6,
}


def break_things(system: System, pause_seconds: float) -> None:
    """Until `system.stopping` is set: a random fault, then a pause in which the system may recover."""
    faults, weights = list(FAULTS), list(FAULTS.values())
    while not system.stopping.wait(pause_seconds * system.rng.uniform(0.5, 1.5)):
        fault = system.rng.choices(faults, weights)[0]
        fault(system)
        system.done[fault.__name__.replace("_", " ")] += 1


def _flip(path: Path, count: int, rng: random.Random) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(count if size else 0):
            offset = rng.randrange(size)
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ (1 << rng.randrange(8))]))


def _kill(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        time.sleep(0)
