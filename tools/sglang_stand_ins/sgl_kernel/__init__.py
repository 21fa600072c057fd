"""Stand-in for sgl_kernel without AMX: torch bodies for the two operations that the plain CPU path calls.

Every other name imports, and raises when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from placeholders import stand_in_below

__version__ = "0.4.10"
__path__: list[str] = []
stand_in_below(__name__)

_MASK = 0xFFFFFFFF


def assign_req_to_token_pool_cpu(
    req_pool_indices: Any, req_to_token: Any, start: Any, end: Any, out_cache_loc: Any, _pool_len: int
) -> None:
    taken = 0
    for position, row in enumerate(req_pool_indices.tolist()):
        first, last = int(start[position]), int(end[position])
        chosen = out_cache_loc[taken : taken + last - first]
        req_to_token[row, first:last] = chosen.to(req_to_token.dtype)
        taken += last - first


def _rotate(value: Any, bits: int) -> Any:
    return ((value << bits) | (value >> (32 - bits))) & _MASK


def _mix(state: Any, word: Any) -> Any:
    word = _rotate((word * 0xCC9E2D51) & _MASK, 15)
    state = _rotate(state ^ ((word * 0x1B873593) & _MASK), 13)
    return (state * 5 + 0xE6546B64) & _MASK


def murmur_hash32_cpu(seed: Any, positions: Any, columns: Any) -> Any:
    seeds = seed.to(torch.int64).unsqueeze(1)
    rows = positions.to(torch.int64).unsqueeze(1)
    cols = columns.to(torch.int64).unsqueeze(0)
    state = torch.zeros((seeds.shape[0], cols.shape[1]), dtype=torch.int64)
    for word in (seeds & _MASK, (seeds >> 32) & _MASK, rows & _MASK, cols & _MASK):
        state = _mix(state, word)
    state = state ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & _MASK
    return (state ^ (state >> 16)).to(torch.uint32)


_library = torch.library.Library("sgl_kernel", "DEF")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32_cpu, "CPU")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not in the CPU stand-in")

    return missing
