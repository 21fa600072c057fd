"""Pinning and placing host memory: whole chunks or nothing, and one clear line when the host refuses."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.numa import nearest_node, prefer_node
from dynamo_connectors.pinning import MAX_CHUNK_BYTES, CudaRegistrar, chunk_bytes, pin_host_memory
from dynamo_connectors.tiers.dram import DramStore

PAGE = 4096
BASE = 1 << 40
#: mlock stands for the driver: the memlock limit refuses it for real. Root is above that limit, nobody is not.
UNDER_A_LIMIT = """
import ctypes, os, resource, sys
from functools import partial
from dynamo_connectors import pinning
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.tiers.dram import DramStore
libc = ctypes.CDLL(None, use_errno=True)
class Mlock:
    def register(self, address, num_bytes):
        done = libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes))
        return None if done == 0 else os.strerror(ctypes.get_errno())
    def unregister(self, address, num_bytes):
        assert libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)) == 0
def locked_kb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmLck"))
limit, rows = int(sys.argv[1]), int(sys.argv[2])
pinning.MAX_CHUNK_BYTES = 1 << 20
pinning.chunk_bytes.__defaults__ = (1 << 20,)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
if os.getuid() == 0:
    os.setuid(65534)
try:
    store = DramStore(rows, 1 << 16, partial(pinning.pin_host_memory, registrar=Mlock()))
    print("pinned", locked_kb())
    store.close()
except ConfigError as error:
    print(error)
print("left", locked_kb())
"""
WITHOUT_ROOM = """
import resource
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.tiers.dram import DramStore
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
DramStore(16, 1 << 20).close()
try:
    DramStore(16 << 10, 1 << 20)
except ConfigError as error:
    print(error)
"""


class Driver:
    """Pins up to `refuse_at` chunks, then refuses."""

    def __init__(self, refuse_at: int = 10**9, raises: bool = False) -> None:
        self.refuse_at = refuse_at
        self.raises = raises
        self.calls: list[tuple[int, int]] = []
        self.pinned: dict[int, int] = {}

    def register(self, address: int, num_bytes: int) -> str | None:
        if len(self.calls) == self.refuse_at:
            if self.raises:
                raise RuntimeError("the driver is gone")
            return "CUDA error 2, out of memory"
        self.calls.append((address, num_bytes))
        self.pinned[address] = num_bytes
        return None

    def unregister(self, address: int, num_bytes: int) -> None:
        assert self.pinned.pop(address) == num_bytes


def child(code: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()


@pytest.mark.parametrize("row_bytes", [1, 4096, 100_000, 2 << 20, 3 * 12_345, (2 << 20) + 64])
def test_a_chunk_splits_no_row_and_no_page_and_has_at_most_64_gib(row_bytes: int) -> None:
    size = chunk_bytes(row_bytes)
    assert size % row_bytes == size % PAGE == 0
    assert MAX_CHUNK_BYTES // 2 < size <= MAX_CHUNK_BYTES == 64 << 30


def test_rows_and_pages_that_only_meet_beyond_the_limit_make_one_larger_chunk() -> None:
    assert chunk_bytes(4097, most_bytes=4096) == 4096 * 4097


def test_all_of_the_memory_is_pinned_once_and_unpinned() -> None:
    driver, row = Driver(), 3 << 20
    total = (200 << 30) // row * row
    unpin = pin_host_memory(BASE, total, row, driver)
    assert len(driver.calls) == 4
    ends = [BASE, *(address + size for address, size in driver.calls)]
    assert ends == [*(address for address, _ in driver.calls), BASE + total]
    assert all((end - BASE) % row == 0 for end in ends)
    unpin()
    unpin()
    assert not driver.pinned


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("refuse_at", [0, 1, 3])
def test_a_refused_chunk_leaves_nothing_pinned(refuse_at: int, raises: bool) -> None:
    driver = Driver(refuse_at, raises)
    with pytest.raises(RuntimeError if raises else ConfigError) as caught:
        pin_host_memory(BASE, 250 << 30, 1 << 20, driver)
    assert len(driver.calls) == refuse_at
    assert not driver.pinned
    if not raises:
        line = str(caught.value)
        assert "\n" not in line
        assert "--kvbm-host-dram-gb" in line
        assert "out of memory" in line
        assert f"only {refuse_at * (64 << 30) / 1e9:.2f} GB" in line


def test_a_store_whose_memory_is_refused_gives_it_back() -> None:
    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0])

    before = pages()

    def refuse(*_: object) -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        DramStore(1024, 1 << 20, refuse)  # type: ignore[arg-type]
    gc.collect()
    assert pages() < before + (512 << 20) // PAGE


def test_a_driver_that_is_not_there_is_not_silent() -> None:
    if torch.cuda.is_available():
        assert CudaRegistrar().register(0, 0) is not None
    else:
        with pytest.raises((RuntimeError, AssertionError, AttributeError)):
            CudaRegistrar().register(BASE, PAGE)


def test_the_memlock_limit_is_one_line_and_leaves_nothing_locked() -> None:
    line, left = child(UNDER_A_LIMIT, 3 << 20, 64)
    assert "--kvbm-host-dram-gb" in line
    assert "memlock" in line
    assert left == "left 0"


def test_memory_within_the_memlock_limit_is_locked_and_given_back() -> None:
    assert child(UNDER_A_LIMIT, 8 << 20, 64) == ["pinned 4096", "left 0"]


def test_a_limit_on_address_space_is_one_line() -> None:
    (line,) = child(WITHOUT_ROOM)
    assert "17.18 GB" in line
    assert "--kvbm-host-dram-gb" in line


def test_a_slab_begins_at_a_page_and_asks_for_huge_pages() -> None:
    store = DramStore(8, 1 << 20)
    assert store.rows.ctypes.data % PAGE == 0
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        flags = mapping_lines(store.rows.ctypes.data, "VmFlags")
        assert " hg" in flags, flags
    store.close()


def mapping_lines(address: int, wanted: str) -> str:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and line.startswith(wanted):
            return line
    raise AssertionError(f"no mapping at {address:x}")


def test_another_slab_is_pinned_alike() -> None:
    driver = Driver()
    store = DramStore(4, PAGE, lambda *memory: pin_host_memory(*memory, driver))
    other = store.another(2)
    assert [size for _, size in driver.calls] == [4 * PAGE, 2 * PAGE]
    other.close()
    store.close()
    assert not driver.pinned


# -- NUMA ----------------------------------------------------------------------------------------------------------
def host(tmp_path: Path, cpulists: Sequence[str], gpu_node: str | None = None) -> Path:
    for number, cpus in enumerate(cpulists):
        node = tmp_path / f"devices/system/node/node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(cpus + "\n")
    if gpu_node is not None:
        gpu = tmp_path / "bus/pci/devices/0001:0a:00.0"
        gpu.mkdir(parents=True)
        (gpu / "numa_node").write_text(gpu_node + "\n")
    return tmp_path


GPU = SimpleNamespace(pci_domain_id=1, pci_bus_id=10, pci_device_id=0)
EVERY_CPU = "0-4095"


@pytest.mark.parametrize(("says", "node"), [("1", 1), ("0", 0), ("-1", None), ("?", None), (None, None)])
def test_the_gpus_node_is_asked_from_the_host(tmp_path: Path, says: str | None, node: int | None) -> None:
    assert nearest_node(GPU, host(tmp_path, ["", EVERY_CPU], says)) == node


def test_a_torch_that_does_not_name_the_gpus_place_places_nothing(tmp_path: Path) -> None:
    assert nearest_node(SimpleNamespace(), host(tmp_path, ["", EVERY_CPU], "1")) is None


@pytest.mark.parametrize(
    ("cpulists", "node"), [([EVERY_CPU], None), (["", EVERY_CPU], 1), ([EVERY_CPU, "5000,5002-5003"], 0)]
)
def test_without_a_gpu_it_is_the_node_of_our_cpus(tmp_path: Path, cpulists: list[str], node: int | None) -> None:
    assert nearest_node(None, host(tmp_path, cpulists)) == node


def test_cpus_on_two_nodes_have_no_nearest(tmp_path: Path) -> None:
    assert nearest_node(None, host(tmp_path, [EVERY_CPU, EVERY_CPU])) is None


def test_the_system_takes_the_wish_for_a_node_that_exists() -> None:
    store = DramStore(4, 1 << 20, numa_node=0)
    maps = Path("/proc/self/numa_maps").read_text().splitlines()
    assert any(line.startswith(f"{store.rows.ctypes.data:x} prefer") and ":0" in line for line in maps)
    store.close()


def test_a_node_that_does_not_exist_is_one_line_and_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    store = DramStore(4, 1 << 20, numa_node=900)
    store.rows[:] = 1
    assert caplog.text.count("not placed on node 900") == 1
    store.close()
    buffer = ctypes.create_string_buffer(1)
    assert not prefer_node(ctypes.addressof(buffer) | 1, 1, 0), "an address that is no page"
