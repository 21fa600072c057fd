"""What the machine itself can do: pinned copies over PCIe, O_DIRECT reads of the disk. Prints one line of JSON.

A process of its own (`python -m benchmarks.served.floors DIR`): its CUDA context is gone before the engines start.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_COPY_BYTES = 1 << 30
_COPIES = 10
_FILE_BYTES = 2 << 30
#: (bytes of one read, readers at a time)
_READS = ((16 << 20, 1), (16 << 20, 4), (2 << 20, 4), (2 << 20, 16))


def main(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **pcie()}
    return facts | disk(folder, _FILE_BYTES if torch.cuda.is_available() else _FILE_BYTES >> 5)


def pcie() -> dict[str, float]:
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True).random_()
    device = torch.empty_like(host, device="cuda")
    rates = {}
    for name, target, source in (("pcie_up_gb_s", device, host), ("pcie_down_gb_s", host, device)):
        seconds = []
        for _ in range(_COPIES + 2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rates[name] = _COPY_BYTES / statistics.median(seconds[2:]) / 1e9
    return rates


def disk(folder: Path, size: int) -> dict[str, Any]:
    path = folder / "floor"
    buffer = mmap.mmap(-1, 16 << 20)
    buffer[:] = os.urandom(1 << 20) * 16
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError as error:
        return {"disk_error": str(error)}
    try:
        started = time.perf_counter()
        for offset in range(0, size, len(buffer)):
            os.pwrite(handle, buffer, offset)
        os.fsync(handle)
        written = size / (time.perf_counter() - started) / 1e9
        rates = {f"{unit >> 20}MiB_x{readers}": _read_rate(handle, size, unit, readers) for unit, readers in _READS}
        return {"disk_write_gb_s": written, "disk_reads_gb_s": rates, "disk_read_gb_s": max(rates.values())}
    finally:
        os.close(handle)
        path.unlink()


def _read_rate(handle: int, size: int, unit: int, readers: int) -> float:
    def read(reader: int) -> None:
        into = mmap.mmap(-1, unit)
        for offset in range(reader * unit, size, unit * readers):
            if os.preadv(handle, [into], offset) != unit:
                raise OSError("short read")

    started = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, range(readers)))
    return size / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
