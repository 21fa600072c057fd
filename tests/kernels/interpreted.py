"""Run with TRITON_INTERPRET=1, as a child of the tests: the real kernels, in Triton's interpreter, over host memory.

`python -m tests.kernels.interpreted copy|tma|compression|staged` prints the cases that are wrong, and how many ran.
"""

from __future__ import annotations

import sys
import warnings
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch

warnings.simplefilter("ignore")

from dynamo_kernels import BlockView, compressed_copy  # noqa: E402
from dynamo_kernels.choices import Case, Choice, Direction, Path  # noqa: E402
from dynamo_kernels.compressed_copy import CompressedCopy  # noqa: E402
from dynamo_kernels.compression import Codec, Compression, HeadLayout, compress_blocks, expand_blocks  # noqa: E402
from dynamo_kernels.machine import KernelCopy, launch  # noqa: E402
from dynamo_kernels.plan import CopyPlan  # noqa: E402

from tests.kernels.fake_machine import FakeMachine, fragment_addresses, memory_at  # noqa: E402
from tests.kernels.memory import CANARY, arena, naive_copy  # noqa: E402

#: Powers of two, what MLA and odd heads make, one chunk, several tiles.
SIZES = [128, 144 * 16, 4096, 18432, 16384, 36864, 65536]
LAYOUTS = [
    ((2, 16, 2, 32), (0, 2)),
    ((2, 2, 16, 32), (0, 1)),
    ((5, 24), ()),
    ((3, 5, 7), (1,)),
    ((4, 2, 2, 16), (1, 2)),
    ((3, 4, 2, 16), (0, 2)),
    ((3, 2, 64), (0, 1)),
]


def run_kernel(copy: KernelCopy) -> None:
    bases = [side.first for side in (copy.band.src, copy.band.dst)]
    ends = [int(each.max()) + copy.band.part_bytes for each in fragment_addresses(copy)]
    ctas = KernelCopy(copy.kernel, copy.band, copy.tables, copy.ids, copy.ctas or 5)
    launch(ctas, *(memory_at(base, end - base) for base, end in zip(bases, ends, strict=True)))


def copies() -> int:
    wrong = 0
    cases = list(product(SIZES, (Choice(Path.ZERO_COPY, 1), Choice(Path.ZERO_COPY, 3), Choice(Path.STAGED)), Direction))
    for size, choice, direction in cases:
        src, dst = arena(4, [size] * 2, 16, 0, 1), arena(3, [size] * 2, 0, 32, 2)
        machine = FakeMachine(run_kernel=run_kernel)

        def chosen(case: object, choice: Choice = choice) -> Choice:
            return choice if case.allows(choice.path) else Choice(Path.ZERO_COPY)  # type: ignore[attr-defined]

        expected = naive_copy(src, [3, 0, 3], dst, [1, 2, 0])
        CopyPlan(src.view, dst.view, direction, machine, chosen).enqueue([3, 0, 3], [1, 2, 0])
        if dst.images() != expected or ("fragments" in machine.calls and choice.path is not Path.STAGED):
            print("wrong:", size, choice, direction)
            wrong += 1
    print(len(cases), "copies")
    return wrong


def tma() -> int:
    """Whole tiles at whole lines: TMA copies. Anything else: it is not offered, and the copy is right all the same."""
    wrong = taken = 0
    # (fragment, its part of a page beyond it, how far parts lie apart, CTAs)
    cases = [
        (16384, 0, 16384, 1), (16384, 128, 5 * 16512, 2), (49152, 256, 5 * 49408, 3), (65536, 0, 65536, 2),
        (1 << 20, 0, 1 << 20, 7), (16384, 16, 5 * 16400, 2), (16384, 0, 16384 + 64, 2), (20480, 0, 20480, 2),
    ]  # fmt: skip
    for size, gap, apart, ctas in cases:
        src, dst = Spread(4, size, gap, apart, 1), Spread(3, size, 2 * gap, apart, 2)
        machine = FakeMachine(run_kernel=run_kernel)

        def chosen(case: Case, ctas: int = ctas) -> Choice:
            return Choice(Path.TMA if case.allows(Path.TMA) else Path.ZERO_COPY, ctas)

        expected = dst.after(src, [3, 0, 3], [1, 2, 0])
        CopyPlan(src.view, dst.view, Direction.D2H, machine, chosen).enqueue([3, 0, 3], [1, 2, 0])
        taken += machine.calls.count("through_tma")
        if dst.memory.numpy().tobytes() != expected:
            print("wrong:", size, gap, apart, ctas)
            wrong += 1
    print(len(cases), "stores,", taken, "by TMA")
    return wrong


class Spread:
    """Blocks of two parts in one allocation, canaries everywhere else."""

    def __init__(self, blocks: int, size: int, gap: int, apart: int, seed: int) -> None:
        self._stride = max(size, 0 if apart > 2 * size else apart + size) + gap
        self._size, self._apart = size, apart
        whole = torch.full((256 + blocks * self._stride + 2 * apart,), CANARY, dtype=torch.uint8)
        self.memory = whole[-whole.data_ptr() % 128 :]
        first = self.memory.storage_offset() + 16
        parts = [self.memory.as_strided((blocks, size), (self._stride, 1), first + part * apart) for part in range(2)]
        generator = torch.Generator().manual_seed(seed)
        for part in parts:
            part.copy_(torch.randint(0, 256, (blocks, size), dtype=torch.uint8, generator=generator))
        self.view = BlockView(tuple(parts))

    def after(self, source: Spread, source_ids: list[int], target_ids: list[int]) -> bytes:
        made, source_bytes = bytearray(self.memory.numpy().tobytes()), source.memory.numpy().tobytes()
        for part in range(2):
            for source_id, target_id in zip(source_ids, target_ids, strict=True):
                start, end = (
                    16 + part * each._apart + number * each._stride
                    for each, number in ((source, source_id), (self, target_id))
                )
                made[end : end + self._size] = source_bytes[start : start + self._size]
        return bytes(made)


def compression() -> int:
    wrong = 0
    cases = list(product((torch.bfloat16, torch.float16, torch.float32), LAYOUTS, Compression))
    for dtype, (sizes, scaled), kind in cases:
        layout = HeadLayout(dtype, sizes, scaled)
        codec = Codec(kind, (layout,) * 2)
        values = [torch.randn(4, layout.elements).mul(3.0**part).to(dtype) for part in range(2)]
        values[0][1] = 0
        values[1][3, 5] = float("nan")
        pages = BlockView.of_pages(values, [layout.page_bytes] * 2)
        memory = [torch.zeros(3, codec.row_bytes, dtype=torch.uint8) for _ in range(2)]
        rows = [BlockView.of_rows(each, codec.part_bytes) for each in memory]
        compress_blocks(codec, pages, [1, 3, 0], rows[0], [2, 0, 1])
        kernels = CompressedCopy(codec, pages, rows[1])
        kernels.run("quantise_pages", rows[1], np.array([1, 3, 0]), np.array([2, 0, 1]), 2)
        backs = [[torch.zeros_like(each) for each in values] for _ in range(2)]
        views = [BlockView.of_pages(back, [layout.page_bytes] * 2) for back in backs]
        expand_blocks(codec, rows[0], [2, 0], views[0], [0, 2])
        expanding = CompressedCopy(codec, views[1], rows[0])
        expanding.run("dequantise_pages", rows[0], np.array([0, 2]), np.array([2, 0]), 2)
        if not torch.equal(*memory) or not same_values(dtype, *backs):
            print("wrong:", dtype, sizes, scaled, kind)
            wrong += 1
    print(len(cases), "codecs")
    return wrong


def staged() -> int:
    """Stores and loads as a GPU makes them, rows through two small buffers, against the reference and in order."""
    wrong, machine = 0, FakeMachine()
    compute, lane = machine.current(), machine.dma
    compute.cuda_stream, lane.cuda_stream = compute, lane
    driver = SimpleNamespace(copy_fragments=machine.copy_fragments)
    torch.cuda.current_stream = lambda *_: compute
    torch.cuda.Stream = lambda *_, **__: lane
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=3)
    compressed_copy.copy_driver = lambda: driver
    for blocks in (1, 2, 5, 7):
        layout = HeadLayout(torch.float32, (2, 4, 2, 8), (0, 2))
        codec = Codec(Compression.INT8, (layout,) * 3)
        compressed_copy._STAGING_BYTES = 2 * codec.row_bytes
        values = [torch.randn(8, layout.elements) for _ in range(3)]
        pages = BlockView.of_pages(values, [layout.page_bytes] * 3)
        memory = [torch.zeros(8, codec.row_bytes, dtype=torch.uint8) for _ in range(2)]
        rows = [BlockView.of_rows(each, codec.part_bytes) for each in memory]
        ids = np.random.permutation(8)[:blocks], np.random.permutation(8)[:blocks]
        compress_blocks(codec, pages, ids[0], rows[0], ids[1])
        CompressedCopy(codec, pages, rows[1])._through_hbm(*ids, loads=False)
        backs = [[torch.zeros_like(each) for each in values] for _ in range(2)]
        views = [BlockView.of_pages(back, [layout.page_bytes] * 3) for back in backs]
        expand_blocks(codec, rows[0], ids[1], views[0], ids[0])
        expanding = CompressedCopy(codec, views[1], rows[0])
        for waits in (False, True):  # the second finds both buffers in use by the first
            expanding._enqueue_all(*ids, loads=True, waits=waits)
        same = [torch.equal(*memory), *(torch.equal(one, other) for one, other in zip(*backs, strict=True))]
        if not all(same):
            print("wrong:", blocks, same)
            wrong += 1
    print(4, "copies each way")
    return wrong


def same_values(dtype: torch.dtype, one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """To the bit, but for bfloat16, which the interpreter cuts off instead of rounding."""
    for a, b in zip(one, other, strict=True):
        if not torch.equal(a.isnan(), b.isnan()):
            return False
        close = 2.0**-7 if dtype is torch.bfloat16 else 0.0
        if not torch.allclose(a.float(), b.float(), rtol=close, atol=0.0, equal_nan=True):
            return False
    return True


if __name__ == "__main__":
    sys.exit({"copy": copies, "tma": tma, "compression": compression, "staged": staged}[sys.argv[1]]())
