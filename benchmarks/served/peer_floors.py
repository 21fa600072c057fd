"""What two GPUs of one host can do between each other: copies, and NIXL's READs from one process to another.

python -m benchmarks.served.peer_floors OUT.json [SECONDS]
Each part is a process of its own with a deadline: one that fails or hangs is noted, and the others still run. Without
GPUs the parts that need none are run on small buffers.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PART_SECONDS = 45.0
#: Should its reader have been killed.
_OWNER_SECONDS = 120.0
_COPIES = 8
_PIECES = (2 << 20, 64 << 10)
_STEP = 1 << 12


def main(out: Path, seconds: float = _PART_SECONDS) -> None:
    facts: dict[str, Any] = {}
    for part in ("link", "host_up_down", "nixl_dram", "nixl_vram"):
        facts[part] = in_child(part, out, seconds)
        print(f"{part}: {json.dumps(facts[part])}", flush=True)
        out.write_text(json.dumps(facts, indent=1) + "\n")


def in_child(part: str, out: Path, seconds: float) -> Any:
    log = out.with_name(f"{out.stem}-{part}.log")
    with log.open("w") as said:
        command = [sys.executable, "-m", "benchmarks.served.peer_floors", part, str(out)]
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as error:
            return _last_facts(error.stdout or b"") | {"error": f"not done in {seconds:.0f} s"}
    found = _last_facts(done.stdout)
    return found if done.returncode == 0 else found | {"error": f"rc {done.returncode}: {log.read_text()[-600:]}"}


def _last_facts(said: bytes) -> dict[str, Any]:
    lines = [line for line in said.decode(errors="replace").splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {}


def rate(copy: Callable[[], None], num_bytes: int) -> float:
    """GB/s, the median of some."""
    seconds = []
    for _ in range(_COPIES + 1):
        started = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - started)
    return round(num_bytes / statistics.median(seconds[1:]) / 1e9, 2)


def size() -> int:
    import torch

    return 1 << 30 if torch.cuda.is_available() else 1 << 24


def link(_: Path) -> None:
    import torch

    facts: dict[str, Any] = {"gpus": torch.cuda.device_count()}
    if facts["gpus"] > 1:
        facts["peer_access"] = torch.cuda.can_device_access_peer(0, 1)
        here, there = (torch.empty(size(), dtype=torch.uint8, device=f"cuda:{place}") for place in (0, 1))

        def copy(target: torch.Tensor, source: torch.Tensor) -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)

        facts["gb_s_0_to_1"] = rate(lambda: copy(there, here), size())
        facts["gb_s_1_to_0"] = rate(lambda: copy(here, there), size())
    print(json.dumps(facts), flush=True)


def host_up_down(_: Path) -> None:
    import torch

    facts: dict[str, Any] = {}
    for place in range(torch.cuda.device_count()):
        host = torch.empty(size(), dtype=torch.uint8, pin_memory=True)
        device = torch.empty(size(), dtype=torch.uint8, device=f"cuda:{place}")
        for name, target, source in (("up", device, host), ("down", host, device)):

            def copy(target: torch.Tensor = target, source: torch.Tensor = source, place: int = place) -> None:
                target.copy_(source, non_blocking=True)
                torch.cuda.synchronize(place)

            facts[f"gpu{place}_{name}_gb_s"] = rate(copy, size())
    print(json.dumps(facts), flush=True)


def nixl(kinds: tuple[str, ...], out: Path) -> None:
    """The reader; the owner is its child, on the other GPU."""
    mail = out.with_name(f"{out.stem}-mail-{kinds[0]}")
    mail.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.served.peer_floors", "own", str(mail), *kinds]
    owner = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"}, stdout=sys.stderr)
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    facts: dict[str, Any] = {}
    try:
        agent = make_agent("reader")
        buffers = {kind: registered(agent, kind) for kind in kinds}
        while not (mail / "ready").exists() and owner.poll() is None:
            time.sleep(0.05)
        theirs = json.loads((mail / "ready").read_text())
        peer = agent.add_remote_agent((mail / "metadata").read_bytes())
        for kind in kinds:
            for piece in _PIECES:
                name = f"{kind}_{piece >> 10}KiB_pieces_gb_s"
                try:
                    facts[name] = rate(lambda k=kind, p=piece: read(agent, peer, buffers[k], theirs[k], p), size())
                    facts[f"{kind}_right"] = right(buffers[kind])
                except Exception as error:  # noqa: BLE001 - what fails is what is to be known
                    facts[name] = f"{type(error).__name__}: {error}"
                print(json.dumps(facts), flush=True)
    finally:
        owner.kill()
        owner.wait()
    os._exit(0)


def own(mail: Path, kinds: tuple[str, ...]) -> None:
    agent = make_agent("owner")
    buffers = {kind: registered(agent, kind) for kind in kinds}
    for buffer in buffers.values():
        buffer.copy_(pattern(buffer))
    addresses = {kind: buffer.data_ptr() for kind, buffer in buffers.items()}
    (mail / "metadata").write_bytes(bytes(agent.get_agent_metadata()))
    (mail / "ready.new").write_text(json.dumps(addresses))
    (mail / "ready.new").rename(mail / "ready")
    time.sleep(_OWNER_SECONDS)


def pattern(like: Any) -> Any:
    import torch

    return (torch.arange(like.numel() // _STEP, device=like.device) % 251).to(torch.uint8).repeat_interleave(_STEP)


def right(buffer: Any) -> bool:
    same = bool((buffer == pattern(buffer)).all().item())
    buffer.zero_()
    return same


def make_agent(name: str) -> Any:
    import importlib

    import torch

    from dynamo_connectors.transport.agent import require_nixl

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    api = importlib.import_module(f"{require_nixl()}._api")
    return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))


def registered(agent: Any, kind: str) -> Any:
    """`paged` is ordinary host memory, `pinned` is CUDA's."""
    import torch

    where: dict[str, Any] = {
        "paged": {},
        "pinned": {"pin_memory": torch.cuda.is_available()},
        "vram": {"device": "cuda"},
    }
    buffer = torch.zeros(size(), dtype=torch.uint8, **where[kind])
    agent.register_memory(rows(buffer.data_ptr(), size(), size()), memory(kind), backends=["UCX"])
    return buffer


def memory(kind: str) -> str:
    return "VRAM" if kind == "vram" else "DRAM"


def rows(address: int, num_bytes: int, piece: int) -> Any:
    import numpy as np

    found = np.zeros((num_bytes // piece, 3), dtype=np.uint64)
    found[:, 0] = address + np.arange(num_bytes // piece) * piece
    found[:, 1] = piece
    return found


def read(agent: Any, peer: str, buffer: Any, address: int, piece: int) -> None:
    kind = "VRAM" if buffer.is_cuda else "DRAM"
    here = agent.get_xfer_descs(rows(buffer.data_ptr(), size(), piece), kind)
    there = agent.get_xfer_descs(rows(address, size(), piece), kind)
    handle = agent.initialize_xfer("READ", here, there, peer)
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    agent.release_xfer_handle(handle)
    if state != "DONE":
        raise RuntimeError(f"NIXL says {state}")


PARTS: dict[str, Callable[[Path], None]] = {
    "link": link,
    "host_up_down": host_up_down,
    "nixl_dram": lambda out: nixl(("paged", "pinned"), out),
    "nixl_vram": lambda out: nixl(("vram",), out),
}

if __name__ == "__main__":
    if sys.argv[1] == "own":
        own(Path(sys.argv[2]), tuple(sys.argv[3:]))
    elif sys.argv[1] in PARTS:
        PARTS[sys.argv[1]](Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
