"""Compiles the kernels for sm_90 without a GPU and prints what their memory instructions look like, as JSON."""

from __future__ import annotations

import json
import re
import warnings

warnings.simplefilter("ignore")

import triton  # noqa: E402
from dynamo_kernels import triton_copy  # noqa: E402
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


if __name__ == "__main__":
    shapes = [("pipelined", 16384 // 8 // words, words, 6) for words in (2048, 512, 256, 16)]
    shapes += [("direct", 1, 2048, 1), ("direct", 4, 512, 1)]
    print(json.dumps([instructions(*shape) for shape in shapes]))
