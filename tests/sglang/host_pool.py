"""A host pool of SGLang's shape over real memory: addresses that are true, and no engine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class FakeHostPool:
    """`page_first`: per page one K and one V piece, far apart. Token slots are indices, as in SGLang."""

    layout = "page_first"
    dtype = "torch.bfloat16"
    layer_num = 2

    def __init__(self, pages: int, page_size: int = 4, piece_bytes: int = 96) -> None:
        self.page_size = page_size
        self.piece_bytes = piece_bytes
        self.bytes_: npt.NDArray[np.uint8] = np.zeros((2, pages, piece_bytes), dtype=np.uint8)

    def get_page_buffer_meta(self, indices: range | list[int]) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        addresses = []
        for start in range(0, len(indices), self.page_size):
            page = indices[start] // self.page_size
            addresses += [self.bytes_[0, page].ctypes.data, self.bytes_[1, page].ctypes.data]
        return addresses, [self.piece_bytes] * len(addresses)

    def slots(self, *pages: int) -> list[int]:
        """The token slots of whole pages."""
        return [page * self.page_size + token for page in pages for token in range(self.page_size)]

    def fill(self, page: int, value: bytes) -> None:
        """Both pieces of `page` become a pattern that depends on `value` and on which piece it is."""
        for piece in (0, 1):
            self.bytes_[piece, page] = np.frombuffer(pattern(value, piece, self.piece_bytes), dtype=np.uint8)

    def holds(self, page: int, value: bytes) -> bool:
        return all(self.bytes_[piece, page].tobytes() == pattern(value, piece, self.piece_bytes) for piece in (0, 1))


def pattern(value: bytes, piece: int, num_bytes: int) -> bytes:
    unit = value + bytes([piece])
    return (unit * (num_bytes // len(unit) + 1))[:num_bytes]
