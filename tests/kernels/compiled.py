"""Compiles the kernels for sm_90 without a GPU and prints what their memory instructions look like, as JSON."""

from __future__ import annotations

import json
import re
import sys
import warnings
from itertools import product

warnings.simplefilter("ignore")

import triton  # noqa: E402
from dynamo_kernels import machine, triton_compression, triton_copy  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ALIGNED = [["tt.divisibility", 16]]
POINTERS = {
    "src": "*i64",
    "dst": "*i64",
    "src_offsets": "*i64",
    "dst_offsets": "*i64",
    "src_ids": "*i32",
    "dst_ids": "*i32",
}
NUMBERS = {"chunks": "i32", "parts": "i32", "chunks_per_part": "i32", "src_stride": "i64", "dst_stride": "i64"}


def instructions(name: str, rows: int, words: int, stages: int) -> dict[str, object]:
    constants = {"ROWS": rows, "WORDS": words, "STAGES": stages}
    source = ASTSource(
        fn=getattr(triton_copy, name),
        signature={**POINTERS, **NUMBERS, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(index,): ALIGNED for index in range(len(POINTERS))},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    ptx = made.asm["ptx"]
    return {
        "kernel": name,
        "words": words,
        "shared_bytes": made.metadata.shared,
        "loads": re.findall(r"ld\.global(\.\S+)", ptx),
        "stores": re.findall(r"st\.global(\.\S+)", ptx),
        "async_bytes": [
            int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)
        ],
    }


def tma(stages: int) -> dict[str, object]:
    constants = {"LINES": 128, "STAGES": stages}
    pointers = {name: kind for name, kind in POINTERS.items() if name not in ("src", "dst")}
    source = ASTSource(
        fn=triton_copy.through_tma,
        signature={
            **dict.fromkeys(("src", "dst"), "tensordesc<i64[128, 16]>"),
            **pointers,
            **NUMBERS,
            **dict.fromkeys(constants, "constexpr"),
        },
        constexprs=constants,
        attrs={(index,): ALIGNED for index in range(2, 2 + len(pointers))},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = made.asm["ptx"]
    return {
        "shared_bytes": made.metadata.shared,
        "bulk_loads": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared::(?:cta|cluster)\.global", ptx)),
        "bulk_stores": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta", ptx)),
        "stores": re.findall(r"st\.global(\.\S+)", ptx),
        "loads": re.findall(r"ld\.global(\.\S+)", ptx),
        "scratch": made.metadata.global_scratch_size,
    }


def compression(name: str, levels: tuple[int, int, int, int], fp8: bool) -> dict[str, object]:
    """Of bfloat16 pages and rows that begin at multiples of 16 bytes, as engines' do."""
    outer, middle, inner, width = levels
    constants = {
        "SCALES_AT": outer * middle * inner * width, "OUTER": outer, "MIDDLE": middle, "INNER": inner, "WIDTH": width,
        "GROUPS": inner, "MIDDLE_2": middle, "WIDTH_2": width, "FP8": fp8, "SMALLEST": 2.0**-120,
        "PAGE_AT": 8, "ROW_AT": 16,
    }  # fmt: skip
    pointers = {"pages": "*bf16", "rows": "*u8", "page_offsets": "*i64", "row_offsets": "*i64"}
    ids = {"page_ids": "*i32", "row_ids": "*i32"}
    numbers = {"blocks": "i32", "parts": "i32", "page_stride": "i64", "row_stride": "i64"}
    source = ASTSource(
        fn=getattr(triton_compression, name),
        signature={**pointers, **ids, **numbers, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(index,): ALIGNED for index in range(len(pointers) + len(ids))},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    return {
        "kernel": name,
        "loads": re.findall(r"ld\.global(\.\S+)", ptx),
        "stores": re.findall(r"st\.global(\.\S+)", ptx),
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["compression"]:
        names, all_levels = ("quantise_pages", "dequantise_pages"), ((2, 16, 8, 128), (1, 16, 8, 128), (8, 16, 2, 128))
        print(json.dumps([compression(*case) for case in product(names, all_levels, (True, False))]))
        sys.exit()
    if sys.argv[1:] == ["tma"]:
        print(json.dumps(tma(machine._STAGES[machine.Kernel.TMA])))
        sys.exit()
    shapes = [("pipelined", 16384 // 8 // words, words, 6) for words in (2048, 512, 256, 16)]
    shapes += [("direct", 1, 2048, 1), ("direct", 4, 512, 1)]
    print(json.dumps([instructions(*shape) for shape in shapes]))
