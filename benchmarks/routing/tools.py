"""Builds the C tools, writes request bodies, starts engines and routers, and reads what their processes used."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from benchmarks.routing.simulated import BLOCK_TOKENS

HERE = Path(__file__).resolve().parent
ENGINES = 8


class MissingToolError(Exception):
    """A tool that this bench needs is not installed; the text says which."""


def build(folder: Path) -> tuple[Path, Path]:
    """Compile the engine and the load generator: (engine, load)."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise MissingToolError("the router benches need a C compiler (apt-get install gcc)")
    built = []
    for name in ("engine", "load"):
        target = folder / name
        command = [compiler, "-O2", "-Wno-unused-function", "-o", str(target), str(HERE / f"{name}.c"), "-lm"]
        subprocess.run(command, check=True)
        built.append(target)
    return built[0], built[1]


def write_bodies(path: Path, turns: int, turn_bytes: int, tokens: int, stream: bool) -> int:
    """Chats of a few sessions that share system prompts, turn by turn; return their mean length in bytes."""
    source = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(5000)]

    def text(length: int) -> str:
        return " ".join(source.choices(words, k=length // 6 + 1))[:length]

    systems = [text(turn_bytes) for _ in range(8)]
    sessions = [[{"role": "system", "content": systems[number % 8]}] for number in range(200)]
    records = []
    for _ in range(turns):
        for messages in sessions:
            messages.append({"role": "user", "content": text(turn_bytes)})
            request = {"model": "m", "messages": messages, "max_tokens": tokens, "temperature": 0.7}
            records.append(json.dumps({**request, "stream": True} if stream else request).encode())
            messages.append({"role": "assistant", "content": text(turn_bytes // 2)})
    path.write_bytes(b"".join(b"%d\n%b\n" % (len(record), record) for record in records))
    return sum(map(len, records)) // len(records)


def router_command(name: str, port: int, engine_ports: Sequence[int], peers: Path | None) -> list[str] | None:
    """How to start a router before these engines; None if it is not installed."""
    urls = [f"http://127.0.0.1:{engine}" for engine in engine_ports]
    kind, _, policy = name.partition(":")
    if kind == "dynamo-proxy":
        code = "import sys; from dynamo_proxy.cli import main; sys.exit(main())"
        flags = [flag for url in urls for flag in ("--engine", url)]
        chosen = ["--router-mode", policy] if policy else []
        if policy == "overlap":
            chosen = ["--kv-overlap-score-weight", "1"]
        return [sys.executable, "-c", code, "--port", str(port), "--admin-port", "0", *chosen, *flags]
    if kind == "splice":
        return [sys.executable, "-m", "benchmarks.routing.splice", str(port), *map(str, engine_ports)]
    if peers is None:
        return None
    if kind == "dynamo":
        program = peers / kind / "bin" / "python"
        planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
        flags = ["--http-port", str(port), "--router-mode", policy, "--kv-cache-block-size", str(BLOCK_TOKENS), *planes]
        return [str(program), "-m", "dynamo.frontend", *flags] if program.exists() else None
    common = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls, "--policy", policy]
    quiet = ["--log-level", "error", "--worker-startup-check-interval", "1", "--prometheus-port", str(port + 1)]
    starts = {
        "sglang-router": ["bin/python", "-m", "sglang_router.launch_router"],
        "vllm-router": ["bin/vllm-router"],
        "smg": ["bin/smg", "launch"],
    }
    program = peers / kind / starts[kind][0]
    return [str(program), *starts[kind][1:], *common, *quiet] if program.exists() else None


def wait_ready(port: int, process: subprocess.Popen[bytes], seconds: float = 60.0) -> bool:
    """True once the router answers a chat request."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
    )
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=3) as answer:
                if answer.status == 200 and b"choices" in answer.read():
                    return True
        except OSError:
            time.sleep(0.3)
    return False


def pinned(core: int, command: Sequence[str]) -> list[str]:
    return ["taskset", "-c", str(core), *command] if shutil.which("taskset") else list(command)


def process_tree(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """Time on a processor of all threads, to the nanosecond."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[0])
            except OSError:
                continue
    return total / 1e9


def resident_mb(pids: Sequence[int]) -> float:
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def get_json(url: str) -> list[int]:
    with urllib.request.urlopen(url, timeout=5) as answer:
        found: list[int] = json.loads(answer.read())
        return found
