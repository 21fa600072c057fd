"""Does an engine that read another's HBM keep it taken when that one is killed? What is free on the owner's GPU.

python -m benchmarks.served.window_kept OUT.json [GB]
The owner registers GB (1) with NIXL on the first GPU, a reader on the second reads all of it. The owner is killed, the
reader forgets it, others come at its place and are killed, the reader's agent is closed, the reader ends. After each
step this process, the third, says what is free on the first GPU; first of all for an owner whom nobody reads.
Everything twice: as UCX comes, and without its cache of mapped memory. Without two GPUs the same steps are taken in
host memory, and what is free is that of the host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ARMS: dict[str, dict[str, str]] = {"as UCX comes": {}, "UCX_CUDA_IPC_CACHE=n": {"UCX_CUDA_IPC_CACHE": "n"}}
#: Owners that come and are killed at one place.
OWNERS = 4
#: Memory of a process that was killed is free when so long nothing has changed.
_SETTLED_SECONDS, _LONGEST_SECONDS = 1.0, 6.0
_STEP = 1 << 12
_PIECE = 2 << 20


def main(out: Path, gb: float = 1.0) -> int:
    import torch

    is_gpu = torch.cuda.device_count() > 1
    facts: dict[str, Any] = {"gpus": torch.cuda.device_count(), "gb": gb, "arms": {}}
    wrong = 0
    for arm, env in ARMS.items():
        steps: list[dict[str, Any]] = []
        facts["arms"][arm] = steps

        def note(step: str, steps: list[dict[str, Any]] = steps, arm: str = arm, **more: Any) -> None:
            steps.append({"step": step, "free_gb": round(settled(is_gpu) / 1e9, 3), **more})
            out.write_text(json.dumps(facts, indent=1) + "\n")
            print(json.dumps({"arm": arm, **steps[-1]}), flush=True)

        try:
            walk(note, env, int(gb * 1e9) // _PIECE * _PIECE)
        except Exception as error:  # noqa: BLE001 - what fails is what is to be known
            note("failed", error=f"{type(error).__name__}: {error}")
        wrong += sum(not step.get("right", True) for step in steps)
    return int(wrong > 0)


def walk(note: Callable[..., None], env: dict[str, str], num_bytes: int) -> None:
    children: list[Child] = []
    try:
        children.append(reader := Child("read", 1, num_bytes, env))
        reader.hears()
        note("the reader is there")
        children.append(owner := Child("own", 0, num_bytes, env))
        owner.hears()
        note("an owner whom nobody reads is there")
        owner.kill()
        note("an owner whom nobody reads is killed")
        for number in range(1, OWNERS + 1):
            children.append(owner := Child("own", 0, num_bytes, env, number))
            place = owner.hears()
            note(f"owner {number} is there")
            said = reader.asked({"do": "read", "number": number, **place})
            note(f"owner {number} is read", **said)
            owner.kill()
            note(f"owner {number} is killed")
            if number == OWNERS:  # forgotten as an engine does that meets the next one at the same address
                break
            reader.asked({"do": "forget"})
            note(f"owner {number} is forgotten")
        note("a READ of one that is killed", **reader.asked({"do": "again"}))
        reader.asked({"do": "forget"})
        note(f"owner {OWNERS} is forgotten")
        reader.asked({"do": "close"})
        note("the reader's agent is closed")
        reader.kill()
        note("the reader is killed")
    finally:
        for child in children:
            child.kill()


def settled(is_gpu: bool) -> int:
    """Bytes that are free on the first GPU, when they change no more."""
    started = changed = time.monotonic()
    free = free_bytes(is_gpu)
    while (now := time.monotonic()) - changed < _SETTLED_SECONDS and now - started < _LONGEST_SECONDS:
        time.sleep(0.1)
        before, free = free, free_bytes(is_gpu)
        if abs(free - before) > 16 << 20:
            changed = now
    return free


def free_bytes(is_gpu: bool) -> int:
    if is_gpu:
        import torch

        return int(torch.cuda.mem_get_info(0)[0])
    return int(next(line.split()[1] for line in open("/proc/meminfo") if line.startswith("MemAvailable"))) << 10


class Child:
    """A process with an agent, which sees one GPU."""

    def __init__(self, part: str, gpu: int, num_bytes: int, env: dict[str, str], number: int = 0) -> None:
        command = [sys.executable, "-m", "benchmarks.served.window_kept", part, str(num_bytes), str(number)]
        env = {**os.environ, **env, "CUDA_VISIBLE_DEVICES": str(gpu), "NIXL_LOG_LEVEL": "ERROR"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True)

    def asked(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self.hears()

    def hears(self) -> dict[str, Any]:
        """NIXL writes there as well."""
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(next(line for line in self._process.stdout if line.startswith("{")))
        return said

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def memory(num_bytes: int) -> tuple[Any, Any]:
    """Bytes of this process's GPU, or of the host, and their region."""
    import torch

    from dynamo_connectors.transport.agent import Region

    is_gpu = torch.cuda.is_available()
    rows = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda" if is_gpu else "cpu")
    return rows, Region(rows.data_ptr(), num_bytes, 0 if is_gpu else None)


def pattern(like: Any, number: int) -> Any:
    import torch

    steps = torch.arange(like.numel() // _STEP, device=like.device)
    return ((steps + 31 * number) % 251).to(torch.uint8).repeat_interleave(_STEP)


def own(num_bytes: int, number: int) -> None:
    from dynamo_connectors.transport.agent import Agent

    rows, region = memory(num_bytes)
    rows.copy_(pattern(rows, number))
    region.settle()
    agent = Agent(f"owner-{os.getpid()}", [region])
    tell(metadata=agent.metadata.hex(), base=region.address)
    sys.stdin.read()


def read(num_bytes: int) -> None:
    from dynamo_connectors.errors import StoreError
    from dynamo_connectors.transport.agent import Agent

    rows, region = memory(num_bytes)
    agent, peer, base = Agent(f"reader-{os.getpid()}", [region]), "", 0
    offsets = range(0, num_bytes, _PIECE)

    def fetch() -> float:
        started = time.perf_counter()
        here = [region.address + offset for offset in offsets]
        there = [base + offset for offset in offsets]
        handle = agent.post(peer, here, there, _PIECE, (region.device, region.device))
        while not agent.is_done(handle):
            if time.perf_counter() - started > 10.0:
                raise StoreError("timeout", "not done in 10 s")
        taken = time.perf_counter() - started
        agent.release(handle)
        return round(num_bytes / taken / 1e9, 2)

    tell()
    for line in sys.stdin:
        asked = json.loads(line)
        facts: dict[str, Any] = {}
        if asked["do"] == "read":
            base, peer = asked["base"], agent.connect(bytes.fromhex(asked["metadata"]))
            rows.zero_()
            region.settle()
            facts["gb_s"] = [fetch() for _ in range(5)]
            facts["right"] = bool((rows == pattern(rows, asked["number"])).all().item())
        elif asked["do"] == "again":
            try:
                facts["gb_s"] = [fetch()]
            except StoreError as error:
                facts["ended"] = error.reason
        elif asked["do"] == "forget":
            agent.forget(peer)
        else:
            agent.close()
        tell(**facts)


if __name__ == "__main__":
    if sys.argv[1] == "own":
        own(*map(int, sys.argv[2:]))
    elif sys.argv[1] == "read":
        read(int(sys.argv[2]))
    else:
        sys.exit(main(Path(sys.argv[1]), *map(float, sys.argv[2:])))
