"""The CUDA driver's batch copies through ctypes: no extension to build, nothing to link.

The driver wants a stream of one's own: on the legacy default stream (handle 0) it answers INVALID_VALUE. CUDA 13 took
`failIdx` out of both calls, so the entry point is asked for by the version whose signature we then use.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from numpy.typing import NDArray

from dynamo_kernels.dma import ORDER_STREAM, OVERLAP, Fragments
from dynamo_kernels.errors import DriverError

#: Fragments a call: the driver's own cost a fragment grows beyond a few hundred, and the engine starts only when the
#: call returns (H200, driver 13.0, 2026-11-22: 64 KiB fragments 38 GB/s in one call, 54 GB/s in calls of 128).
_FRAGMENTS_PER_CALL = 128
_LINE_COPIES_PER_CALL = 16
_WITHOUT_FAIL_INDEX = 13000
_WITH_FAIL_INDEX = 12080

_Pointer, _Size = ctypes.c_void_p, ctypes.c_size_t


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes; the location hints (two ints each) matter to managed memory alone."""

    _fields_ = (
        ("order", ctypes.c_uint),
        ("src_hint", ctypes.c_int * 2),
        ("dst_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class CopyDriver:
    """Both batch calls of one process's driver."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(f"the CUDA driver cannot be loaded: {error}") from error
        version = ctypes.c_int()
        library.cuDriverGetVersion(ctypes.byref(version))
        self.version = version.value
        self._fail_index = _Size()
        self._has_fail_index = self.version < _WITHOUT_FAIL_INDEX
        tail: list[Any] = [_Pointer] if self._has_fail_index else []
        flat = [_Pointer, _Pointer, _Pointer, _Size, _Pointer, _Pointer, _Size, *tail, _Pointer]
        self._flat = self._entry(library, b"cuMemcpyBatchAsync", flat)
        lines = [_Size, _Pointer, *tail, ctypes.c_ulonglong, _Pointer]
        self._lines = self._entry(library, b"cuMemcpy3DBatchAsync", lines)
        self._attributes = _Attributes(ORDER_STREAM, (0, 0), (0, 0), OVERLAP)
        self._first_index = _Size(0)

    def _entry(self, library: Any, name: bytes, arguments: list[Any]) -> Any:
        wanted = _WITH_FAIL_INDEX if self._has_fail_index else _WITHOUT_FAIL_INDEX
        address, status = ctypes.c_void_p(), ctypes.c_int()
        code = library.cuGetProcAddress_v2(
            name, ctypes.byref(address), wanted, ctypes.c_uint64(0), ctypes.byref(status)
        )
        if code or not address.value:
            raise DriverError(f"the CUDA driver {self.version} has no {name.decode()} (12.8 is the first that has)")
        return ctypes.CFUNCTYPE(ctypes.c_uint, *arguments)(address.value)

    def copy_fragments(self, table: Fragments, stream: int) -> None:
        """Enqueues every fragment on the stream with this handle."""
        count = len(table.sizes)
        dsts, srcs, sizes = table.dsts.ctypes.data, table.srcs.ctypes.data, table.sizes.ctypes.data
        attributes, index = ctypes.addressof(self._attributes), ctypes.addressof(self._first_index)
        for start in range(0, count, _FRAGMENTS_PER_CALL):
            at, some = 8 * start, min(_FRAGMENTS_PER_CALL, count - start)
            code = self._flat(dsts + at, srcs + at, sizes + at, some, attributes, index, 1, *self._tail(), stream)
            self._raise_for(code, "cuMemcpyBatchAsync", stream)

    def copy_lines(self, table: NDArray[Any], stream: int) -> None:
        """Enqueues an array of `dma.LINE_COPY` on the stream with this handle."""
        for start in range(0, len(table), _LINE_COPIES_PER_CALL):
            some = min(_LINE_COPIES_PER_CALL, len(table) - start)
            address = table.ctypes.data + start * table.itemsize
            code = self._lines(some, address, *self._tail(), 0, stream)
            self._raise_for(code, "cuMemcpy3DBatchAsync", stream)

    def _tail(self) -> tuple[int, ...]:
        return (ctypes.addressof(self._fail_index),) if self._has_fail_index else ()

    @staticmethod
    def _raise_for(code: int, name: str, stream: int) -> None:
        if code:
            hint = "" if stream else "; it refuses the legacy default stream, use a stream of your own"
            raise DriverError(f"{name} answered CUDA error {code}{hint}")


@cache
def copy_driver() -> CopyDriver:
    """The process's driver, asked once."""
    return CopyDriver()
