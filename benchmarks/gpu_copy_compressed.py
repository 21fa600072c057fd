"""FP8 and INT8 rows of the Llama-3.1-8B shape: rates in bytes of KV, error, and the kernels against the reference."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.compressed_copy import CompressedCopy
from dynamo_kernels.compression import Codec, Compression, HeadLayout, compress_blocks, expand_blocks

LAYERS, BLOCKS = 32, 128
LAYOUT = HeadLayout(torch.bfloat16, (2, 16, 8, 128), (0, 2))


def compressed(beside_decode: Any) -> list[dict[str, Any]]:
    """One entry a format. `beside_decode(copy, num_bytes)` gives (slow-down, GB/s)."""
    found = []
    pages = [torch.randn(BLOCKS, LAYOUT.elements, device="cuda").to(torch.bfloat16) for _ in range(LAYERS)]
    back = [torch.empty_like(page) for page in pages]
    sizes = [LAYOUT.page_bytes] * LAYERS
    kv_bytes = BLOCKS * sum(sizes)
    for compression in Compression:
        codec = Codec(compression, (LAYOUT,) * LAYERS)
        memory = torch.zeros((BLOCKS, codec.row_bytes), dtype=torch.uint8, pin_memory=True)
        wanted = torch.zeros_like(memory)
        rows = BlockView.of_rows(memory, codec.part_bytes)
        hbm, again = BlockView.of_pages(pages, sizes), BlockView.of_pages(back, sizes)
        ids = np.random.default_rng(2).permutation(BLOCKS).tolist()
        store, load = CompressedCopy(codec, hbm, rows), CompressedCopy(codec, again, rows)
        store.store(ids, list(range(BLOCKS)))
        compress_blocks(codec, hbm, ids, BlockView.of_rows(wanted, codec.part_bytes), list(range(BLOCKS)))
        entry: dict[str, Any] = {"format": compression.value, "row_bytes_of_raw": codec.row_bytes * BLOCKS / kv_bytes}
        entry["kernel_bytes_equal_reference"] = torch.equal(memory, wanted)
        load.load(list(range(BLOCKS)), ids)
        ours = [page.clone() for page in back]
        expand_blocks(codec, rows, list(range(BLOCKS)), again, ids)
        entry["loaded_equals_reference"] = all(map(torch.equal, ours, back))
        entry["largest_error_of_group_maximum"] = max(_error(a, b) for a, b in zip(pages, ours, strict=True))
        # What could hold a copy up: the kernel writing to the host itself, and both kernels without PCIe at all.
        inside = BlockView.of_rows(torch.zeros_like(memory, device="cuda"), codec.part_bytes)
        for ctas in (16, 32, 132):
            for where, target in (("host", rows), ("hbm", inside)):
                seconds = _seconds(partial(_run, "quantise_pages", store, target, ids, ctas))
                entry[f"quantise_to_{where}_{ctas}_ctas_gb_per_s"] = kv_bytes / seconds / 1e9
        seconds = _seconds(partial(_run, "dequantise_pages", load, inside, ids, 132))
        entry["dequantise_in_hbm_gb_per_s"] = kv_bytes / seconds / 1e9
        loading, storing = partial(load.load, list(range(BLOCKS)), ids), partial(store.store, ids, list(range(BLOCKS)))
        entry["load_gb_per_s"] = kv_bytes / _seconds(loading) / 1e9
        entry["store_gb_per_s"] = kv_bytes / _seconds(storing) / 1e9
        entry["store_decode"] = beside_decode(storing, kv_bytes)
        entry["load_decode"] = beside_decode(loading, kv_bytes)
        found.append(entry)
    return found


def _run(kernel: str, copy: CompressedCopy, rows: BlockView, ids: list[int], ctas: int) -> None:
    copy.run(kernel, rows, np.asarray(ids), np.arange(len(ids)), ctas)
    torch.cuda.current_stream().synchronize()


def _seconds(run: Any) -> float:
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _error(page: torch.Tensor, back: torch.Tensor) -> float:
    """The largest difference as a fraction of its group's largest magnitude."""
    there, here = (each.float().view(-1, *LAYOUT.levels) for each in (page, back))
    largest = there.abs().amax(dim=(2, 4), keepdim=True)
    return float(((there - here).abs() / largest).max())
