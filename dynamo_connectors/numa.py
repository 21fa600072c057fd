"""Puts host memory on the node of the GPU, or of the CPUs, that uses it. Where that cannot be, nothing changes."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_SYSTEM = Path("/sys")
#: mbind has no wrapper in libc, and libnuma is not on every host.
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED = 1
_MASK_BITS = 1024


def nearest_node(gpu: Any | None, system: Path = _SYSTEM) -> int | None:
    """The node of `gpu` (torch's device properties), else the one node of this process's CPUs.

    None when there is only one node, or when the host does not say.
    """
    nodes = sorted(system.glob("devices/system/node/node[0-9]*"))
    if len(nodes) < 2:
        log.debug("dynamo: one NUMA node, host memory is near everything")
        return None
    if gpu is not None:
        return _gpu_node(gpu, system)
    ours = os.sched_getaffinity(0)
    used = [int(node.name[4:]) for node in nodes if ours & _cpus((node / "cpulist").read_text())]
    return used[0] if len(used) == 1 else None


def prefer_node(address: int, num_bytes: int, node: int) -> bool:
    """Asks for the pages of untouched memory to come from `node` while it has room. False when the system refuses."""
    number = _MBIND.get(platform.machine())
    if number is None:
        log.debug("dynamo: no NUMA placement on %s", platform.machine())
        return False
    mask = (ctypes.c_ulong * (_MASK_BITS // 64))()
    mask[node // 64] = 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (
        ctypes.c_void_p(address),
        ctypes.c_ulong(num_bytes),
        _MPOL_PREFERRED,
        mask,
        ctypes.c_ulong(_MASK_BITS),
        0,
    )
    if libc.syscall(number, *arguments) != 0:
        log.warning("dynamo: host memory is not placed on node %d: %s", node, os.strerror(ctypes.get_errno()))
        return False
    return True


def _gpu_node(gpu: Any, system: Path) -> int | None:
    try:
        place = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
        node = int((system / "bus/pci/devices" / place / "numa_node").read_text())
    except (AttributeError, OSError, ValueError) as error:
        log.debug("dynamo: the host does not say which node the GPU is on: %s", error)
        return None
    return node if node >= 0 else None


def _cpus(text: str) -> set[int]:
    """`0-3,8` -> {0, 1, 2, 3, 8}"""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found
