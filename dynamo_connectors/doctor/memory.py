"""Host memory: how much there is, how much may be locked, and how much /dev/shm holds."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from dynamo_connectors.doctor.finding import Finding, Level, in_gb
from dynamo_connectors.host_room import container_limit_bytes

GIGABYTE = 10**9
CAP_IPC_LOCK = 14
# Docker's default for /dev/shm. Engines with several workers exchange messages there and need more.
DOCKER_DEFAULT_SHM_BYTES = 64 * 2**20
SMALLER = "choose a smaller --kvbm-host-dram-gb"


def meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo as bytes."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) >= 2}


def judge_memory(total_bytes: int, available_bytes: int, wanted_gb: float | None) -> Finding:
    detail = f"{in_gb(available_bytes)} of {in_gb(total_bytes)} available"
    wanted_bytes = (wanted_gb or 0) * GIGABYTE
    if wanted_bytes > total_bytes:
        return Finding(Level.FAIL, "memory", f"{detail}, {wanted_gb:g} GB wanted for KV", SMALLER)
    if wanted_bytes > available_bytes:
        return Finding(Level.WARN, "memory", f"{detail}, {wanted_gb:g} GB wanted for KV", SMALLER)
    return Finding(Level.OK, "memory", detail)


def judge_locked_memory(limit_bytes: int | None, has_rdma: bool, wanted_gb: float | None) -> Finding:
    """`limit_bytes` is None when unlimited. CUDA pins without asking the limit; RDMA registration obeys it."""
    name, remedy = (
        "locked memory",
        "ulimit -l unlimited; in Docker --ulimit memlock=-1; in systemd LimitMEMLOCK=infinity",
    )
    if limit_bytes is None:
        return Finding(Level.OK, name, "unlimited")
    detail = f"limit {limit_bytes / 2**20:.0f} MiB (RLIMIT_MEMLOCK)"
    if wanted_gb is not None and wanted_gb * GIGABYTE > limit_bytes:
        level = Level.FAIL if has_rdma else Level.WARN
        return Finding(level, name, f"{detail}; registering {wanted_gb:g} GB of KV for RDMA needs more", remedy)
    if wanted_gb is None and has_rdma:
        return Finding(Level.WARN, name, f"{detail}: registering KV for RDMA may need more", remedy)
    return Finding(Level.OK, name, detail)


def judge_shared_memory(free_bytes: int, total_bytes: int, wanted_gb: float | None) -> Finding:
    name, remedy = "/dev/shm", "docker run --shm-size or --ipc=host; in Kubernetes an emptyDir with medium: Memory"
    detail = f"{in_gb(free_bytes)} of {in_gb(total_bytes)} free"
    if total_bytes <= DOCKER_DEFAULT_SHM_BYTES:
        return Finding(Level.WARN, name, f"{detail}: too small for an engine with several workers", remedy)
    if wanted_gb is not None and wanted_gb * GIGABYTE > free_bytes:
        return Finding(Level.WARN, name, f"{detail}, less than the {wanted_gb:g} GB of KV", remedy)
    return Finding(Level.OK, name, detail)


def has_ipc_lock(status: str) -> bool:
    """Whether /proc/self/status shows CAP_IPC_LOCK as effective."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_IPC_LOCK & 1)
    return False


def memory_lock_limit_bytes() -> int | None:
    """RLIMIT_MEMLOCK; None where there is none, or where CAP_IPC_LOCK lifts it."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    lifted = has_ipc_lock(Path("/proc/self/status").read_text())
    return None if lifted or soft == resource.RLIM_INFINITY else soft


def examine_memory(wanted_gb: float | None, rdma_devices: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    rows = meminfo(Path("/proc/meminfo").read_text())
    total, available = rows["MemTotal"], rows["MemAvailable"]
    if (limit := container_limit_bytes()) is not None:
        total, available = min(total, limit), min(available, limit)
    has_rdma = rdma_devices.is_dir() and any(rdma_devices.iterdir())
    findings = [
        judge_memory(total, available, wanted_gb),
        judge_locked_memory(memory_lock_limit_bytes(), has_rdma, wanted_gb),
    ]
    try:
        shm = os.statvfs("/dev/shm")
    except OSError as error:
        return [*findings, Finding(Level.FAIL, "/dev/shm", str(error), "mount a tmpfs on /dev/shm")]
    free, size = shm.f_bavail * shm.f_frsize, shm.f_blocks * shm.f_frsize
    return [*findings, judge_shared_memory(free, size, wanted_gb)]
