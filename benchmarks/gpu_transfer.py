"""The transfer engine on a GPU: bytes after a round trip, the fence against running compute, rates beside one big copy.

Llama-3.1-8B shape, 16-token blocks. `--without-fence` shows what the fence prevents.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from dynamo_kernels import BlockView, ComputeFence

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.config import HOST_DRAM, NVME_SSD
from dynamo_connectors.jobs import LoadItem, LoadJob, MoveItem, MoveJob, StoreItem, StoreJob
from dynamo_connectors.layout import page_layout
from dynamo_connectors.pinning import pin_host_memory
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.nvme import NvmeStore
from dynamo_connectors.transfer import Job, Stores, TransferEngine

LAYERS, BLOCKS, DISK_BLOCKS, PAGE = 32, 512, 64, (2, 16, 8, 128)
ROUNDS, FENCED_BLOCKS = 30, 64


@dataclass
class Rig:
    engine: TransferEngine
    layers: list[torch.Tensor]
    dram: DramStore
    row_bytes: int

    def run(self, job: Job) -> float:
        """Seconds; fails loudly when a block failed."""
        started = time.perf_counter()
        self.engine.submit(job, ComputeFence(self.layers[0].device))
        reports = []
        while not reports:
            reports = self.engine.poll(0.05)
        assert not reports[0].failed, reports[0].failed
        return time.perf_counter() - started

    def rate(self, blocks: int, seconds: float) -> str:
        return f"{blocks * self.row_bytes / seconds / 1e9:.2f} GB/s"


@contextmanager
def rig(device: torch.device) -> Iterator[Rig]:
    layers = [torch.randn(BLOCKS, *PAGE, device=device).to(torch.bfloat16) for _ in range(LAYERS)]
    pages = [page_layout(str(i), tuple(t.shape), t.stride(), 2, 0) for i, t in enumerate(layers)]
    row_bytes = sum(page.page_bytes for page in pages)
    with tempfile.TemporaryDirectory() as folder:
        dram = DramStore(BLOCKS, row_bytes, pin_host_memory)
        disk = NvmeStore(Path(folder), DISK_BLOCKS, row_bytes, Namespace("bench", "m", "r", "d", "l", 16))
        view = BlockView.of_pages(layers, [page.page_bytes for page in pages])
        engine = TransferEngine(view, Stores(dram, disk))
        try:
            yield Rig(engine, layers, dram, row_bytes)
        finally:
            engine.close()


def round_trip(rig: Rig) -> None:
    keys = [BlockKey(str(i).encode()) for i in range(BLOCKS)]
    wanted = [layer.clone() for layer in rig.layers]
    blocks, slots = list(range(BLOCKS)), list(range(BLOCKS))[::-1]
    seconds = rig.run(StoreJob(1, tuple(map(StoreItem, keys, blocks, slots))))
    print(f"HBM to DRAM    {rig.rate(BLOCKS, seconds)}")
    seconds = rig.run(
        MoveJob(2, HOST_DRAM, NVME_SSD, tuple(MoveItem(keys[i], slots[i], i) for i in range(DISK_BLOCKS)))
    )
    print(f"DRAM to disk   {rig.rate(DISK_BLOCKS, seconds)}")
    for layer in rig.layers:
        layer.zero_()
    items = tuple(LoadItem(keys[i], NVME_SSD, i, i) for i in range(DISK_BLOCKS))
    print(f"disk to HBM    {rig.rate(DISK_BLOCKS, rig.run(LoadJob(3, 'r', items)))}")
    items = tuple(LoadItem(keys[i], HOST_DRAM, slots[i], i) for i in range(DISK_BLOCKS, BLOCKS))
    print(f"DRAM to HBM    {rig.rate(BLOCKS - DISK_BLOCKS, rig.run(LoadJob(4, 'r', items)))}")
    equal = all(torch.equal(got, want) for got, want in zip(rig.layers, wanted, strict=True))
    print(f"round trip bit-exact: {equal}")


def floor(rig: Rig) -> None:
    pinned = torch.empty(BLOCKS * rig.row_bytes, dtype=torch.uint8, pin_memory=True)
    on_gpu = torch.empty_like(pinned, device=rig.layers[0].device)
    for name, target, source in (("HBM to DRAM", pinned, on_gpu), ("DRAM to HBM", on_gpu, pinned)):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        print(f"one big pinned copy, {name}: {rig.rate(BLOCKS, time.perf_counter() - started)}")


def behind_running_compute(rig: Rig) -> None:
    """Work is queued on the compute stream, then a job is submitted at once: it must see the work's result."""
    matrix = torch.randn(8192, 8192, device=rig.layers[0].device, dtype=torch.bfloat16)
    ids = range(FENCED_BLOCKS)
    keys = [BlockKey(f"f{i}".encode()) for i in ids]

    def busy(then: Callable[[torch.Tensor], object]) -> None:
        for _ in range(20):
            matrix @ matrix
        for layer in rig.layers:
            then(layer[:FENCED_BLOCKS])

    wrong_stores = wrong_loads = 0
    for number in range(1, ROUNDS + 1):
        busy(lambda blocks, value=number: blocks.fill_(value))
        rig.run(StoreJob(10, tuple(map(StoreItem, keys, ids, ids))))
        stored = torch.from_numpy(rig.dram.rows[:FENCED_BLOCKS]).view(torch.bfloat16)
        wrong_stores += not bool((stored == number).all())
        busy(lambda blocks: blocks.zero_())
        rig.run(LoadJob(11, "r", tuple(LoadItem(keys[i], HOST_DRAM, i, i) for i in ids)))
        loaded = torch.stack([layer[:FENCED_BLOCKS] for layer in rig.layers])
        wrong_loads += not bool((loaded == number).all())
    print(f"stores behind running compute that took old bytes: {wrong_stores} of {ROUNDS}")
    print(f"loads behind running compute that were overwritten: {wrong_loads} of {ROUNDS}")


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 0
    device = torch.device("cuda", 0)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    if "--without-fence" in arguments:
        ComputeFence.wait = lambda self: None  # type: ignore[method-assign]
    with rig(device) as built:
        round_trip(built)
        floor(built)
        behind_running_compute(built)
    return 0
