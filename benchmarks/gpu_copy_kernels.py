"""Copy kernels that were tried and are not in the product: bulk copies (TMA), TMA descriptors, words through registers.

`gpu_copy_shapes` times them; `compile_without_gpu` is what a machine without a GPU can check of the bulk kernel.
"""
# ruff: noqa: N803 - constexpr arguments are written in capitals, as Triton does

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from benchmarks.gpu_copy_rivals import Copy, Field

KIB = 1 << 10
#: One warp a CTA. Addresses of 32 chunks at a time are read ahead, one by each lane; lane 0 issues the bulk copies:
#: STAGES - LAG of them on their way in, at most LAG still being read on their way out.
BULK = r"""
typedef long long i64; typedef unsigned int u32;
__device__ __forceinline__ i64 at(const i64* table, i64 turn, int chunks, int per_fragment) {
  i64 chunk = blockIdx.x + turn * gridDim.x;
  if (chunk >= chunks) chunk = chunks - 1;
  i64 fragment = chunk / per_fragment;
  return table[fragment] + (chunk - fragment * per_fragment) * CHUNK;
}
__device__ __forceinline__ void take(u32 to, i64 from, u32 barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(CHUNK) : "memory");
#if FIRST
  i64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
    "[%0], [%1], %2, [%3], %4;"
    :: "r"(to), "l"(from), "r"(CHUNK), "r"(barrier), "l"(policy) : "memory");
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
    :: "r"(to), "l"(from), "r"(CHUNK), "r"(barrier) : "memory");
#endif
}
__device__ __forceinline__ void give(i64 to, u32 from) {
#if FIRST
  i64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;"
    :: "l"(to), "r"(from), "r"(CHUNK), "l"(policy) : "memory");
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
    :: "l"(to), "r"(from), "r"(CHUNK) : "memory");
#endif
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile("{\n.reg .pred done;\nagain:\n"
    "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
    :: "r"(barrier), "r"(parity) : "memory");
}
extern "C" __global__ void __launch_bounds__(32)
bulk_copy(const i64* sources, const i64* targets, int chunks, int per_fragment) {
  extern __shared__ __align__(128) char ring[];
  __shared__ __align__(8) unsigned long long full[STAGES];
  const int lane = threadIdx.x, ahead = STAGES - LAG;
  const u32 memory = (u32)__cvta_generic_to_shared(ring), barriers = (u32)__cvta_generic_to_shared(full);
  if (lane == 0) {
    for (int stage = 0; stage < STAGES; ++stage)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barriers + 8 * stage) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncwarp();
  const int turns = ((int)blockIdx.x < chunks) ? (chunks - 1 - (int)blockIdx.x) / (int)gridDim.x + 1 : 0;
  i64 source = at(sources, lane, chunks, per_fragment), later_source = at(sources, 32 + lane, chunks, per_fragment);
  i64 target = at(targets, lane, chunks, per_fragment), later_target = at(targets, 32 + lane, chunks, per_fragment);
  for (int turn = -ahead; turn < turns; ++turn) {
    const int next = turn + ahead;
    if (turn >= 0) {
      if (turn && turn % 32 == 0) {
        target = later_target;
        later_target = at(targets, turn + 32 + lane, chunks, per_fragment);
      }
      const i64 to = __shfl_sync(0xffffffffu, target, turn % 32);
      wait(barriers + 8 * (turn % STAGES), (turn / STAGES) & 1);
      if (lane == 0) give(to, memory + (turn % STAGES) * CHUNK);
      __syncwarp();
    }
    if (next < turns) {
      if (next && next % 32 == 0) {
        source = later_source;
        later_source = at(sources, next + 32 + lane, chunks, per_fragment);
      }
      const i64 from = __shfl_sync(0xffffffffu, source, next % 32);
      if (lane == 0) {
        asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(LAG) : "memory");
        take(memory + (next % STAGES) * CHUNK, from, barriers + 8 * (next % STAGES));
      }
      __syncwarp();
    }
  }
  if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
"""


def bulk_source(chunk: int, stages: int, lag: int, first: bool) -> str:
    return f"#define CHUNK {chunk}\n#define STAGES {stages}\n#define LAG {lag}\n#define FIRST {int(first)}\n{BULK}"


@cache
def _bulk(chunk: int, stages: int, lag: int, first: bool) -> Any:
    """By NVRTC through torch, or where that is missing by nvcc."""
    source = bulk_source(chunk, stages, lag, first)
    utils: Any = __import__("torch.cuda._utils", fromlist=["_utils"])
    try:
        cubin, name = utils._nvrtc_compile(source, "bulk_copy", "90")
    except (OSError, RuntimeError) as error:
        print(f"   (NVRTC: {str(error)[:300]}; nvcc instead)", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            code, made = Path(folder, "bulk.cu"), Path(folder, "bulk.cubin")
            code.write_text(source)
            subprocess.run(["nvcc", "-cubin", "-arch=sm_90", "-o", str(made), str(code)], check=True)
            cubin, name = made.read_bytes(), "bulk_copy"
    kernel = utils._cuda_load_module(cubin, [name])[name]
    kernel.set_shared_memory_config(chunk * stages)
    return kernel


def bulk_copies(ctas: int, chunk: int, stages: int, lag: int = 1, first: bool = False) -> Callable[[Field], Copy]:
    """TMA without a tensor map: `cp.async.bulk` between memory and shared memory, both ways."""

    def build(field: Field) -> Copy:
        kernel = _bulk(chunk, stages, lag, first)
        sources, targets = (torch.from_numpy(each).to(field.hbm.device) for each in field.addresses())
        per_fragment = field.fragment // chunk
        arguments = [sources, targets, len(sources) * per_fragment, per_fragment]

        def copy() -> None:
            kernel((ctas, 1, 1), (32, 1, 1), arguments, shared_mem=chunk * stages)

        return copy

    return build


def compile_without_gpu(library: str, source: str) -> bytes:
    """Machine code for sm_90, by the NVRTC library at this path. Raises ValueError with the compiler's words."""
    nvrtc, program = ctypes.CDLL(library), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"bulk.cu", 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(b"--gpu-architecture=sm_90"))
    what = "ProgramLog" if failed else "CUBIN"
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    if failed:
        raise ValueError(text.value.decode())
    return text.raw


#: A line of a descriptor is what one swizzle spans, 128 bytes; a tile is one bulk tensor copy of 128 lines.
LINE_BYTES, TILE_LINES = 128, 128
_LINES = tl.constexpr(TILE_LINES)


def tiles_of(field: Field, tile_bytes: int, unit: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(source, destination) and, on the device, at which `unit` of them each tile begins (2, tiles), int32."""
    sides = [field.host, field.hbm] if field.loads else [field.hbm, field.host]
    steps = np.arange(0, field.fragment, tile_bytes)
    starts = [
        (table[:, None] - side.data_ptr() + steps).ravel() // unit
        for table, side in zip(field.addresses(), sides, strict=True)
    ]
    return sides, torch.from_numpy(np.stack(starts).astype(np.int32)).to(field.hbm.device)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def tma_tiles(src, dst, starts, tiles, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """`src` and `dst` are descriptors over lines of 128 bytes; `starts` says at which line a tile begins."""
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        words = src.load([tl.load(starts + tile), 0])
        dst.store([tl.load(starts + tiles + tile), 0], words)


def tma_descriptors(ctas: int, stages: int, warps: int = 4) -> Callable[[Field], Copy]:
    """TMA as Triton offers it. Fragments of at least 16 KiB."""

    def build(field: Field) -> Copy:
        from triton.tools.tensor_descriptor import TensorDescriptor

        sides, starts = tiles_of(field, TILE_LINES * LINE_BYTES, LINE_BYTES)
        lines = [side.view(torch.int64).view(-1, LINE_BYTES // 8) for side in sides]
        views = [TensorDescriptor.from_tensor(each, [TILE_LINES, LINE_BYTES // 8]) for each in lines]
        return partial(tma_tiles[(ctas,)], *views, starts, starts.shape[1], STAGES=stages, num_warps=warps)

    return build


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def words_through_registers(src, dst, starts, tiles, WORDS: tl.constexpr, MODIFIER: tl.constexpr):  # type: ignore[no-untyped-def]
    """No shared memory, so that it may lie beside decode's CTAs; stores with a cache hint. `starts` counts 16 bytes."""
    column = tl.arange(0, WORDS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
        source = tl.load(starts + tile).to(tl.int64) * 2
        target = tl.load(starts + tiles + tile).to(tl.int64) * 2
        words = tl.load(src + source + column, cache_modifier=".cg")
        tl.store(dst + target + column, words, cache_modifier=MODIFIER)


def registers(ctas: int, tile: int, warps: int, modifier: str = "") -> Callable[[Field], Copy]:
    def build(field: Field) -> Copy:
        sides, starts = tiles_of(field, tile, 16)
        src, dst = (side.view(torch.int64) for side in sides)
        settings = {"WORDS": tile // 8, "MODIFIER": modifier, "num_warps": warps}
        return partial(words_through_registers[(ctas,)], src, dst, starts, starts.shape[1], **settings)

    return build
