"""SGLang's host pages as opaque bytes: addresses and lengths from the pool, checked, never interpreted."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from dynamo_connectors.errors import StoreError, UnsupportedLayoutError


class HostPool(Protocol):
    """What we use of SGLang's host pools."""

    page_size: int

    def get_page_buffer_meta(self, indices: Any) -> Any:
        """(addresses, lengths) of the pieces of the pages that `indices` name, page after page."""


@dataclass(frozen=True)
class PageShape:
    """How one page lies in the pool: the lengths of its pieces, in bytes and in order."""

    page_tokens: int
    piece_bytes: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return sum(self.piece_bytes)


def page_shape(pool: HostPool, first_page: Any) -> PageShape:
    """Asks the pool about one page. Raises `UnsupportedLayoutError` when it has no plain pages."""
    try:
        meta = pool.get_page_buffer_meta(first_page)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise _unsupported(pool, f"it does not tell where its pages lie: {error}") from error
    if not meta or len(meta[0]) != len(meta[1]) or not meta[0]:
        raise _unsupported(pool, "it has no bytes of its own")
    sizes = tuple(int(size) for size in meta[1])
    if min(sizes) < 1:
        raise _unsupported(pool, f"a page has pieces of {sizes} bytes")
    return PageShape(int(pool.page_size), sizes)


def layout_fingerprint(pool: HostPool, shape: PageShape) -> str:
    """Changes whenever the bytes of a row would be read differently."""
    facts = [type(pool).__name__, getattr(pool, "layout", ""), getattr(pool, "storage_format_tag", None)]
    facts += [getattr(pool, name, None) for name in ("layer_num", "start_layer", "end_layer", "head_num", "head_dim")]
    text = repr((facts, shape))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def locate_pages(pool: HostPool, indices: Any, num_pages: int, shape: PageShape) -> list[list[memoryview]]:
    """The pieces of `num_pages` pages, writable and in place.

    Raises `StoreError` when the pool's answer is not exactly that many pages of that shape: a wrong length here would
    be somebody else's memory.
    """
    if len(indices) != num_pages * shape.page_tokens:
        raise StoreError("bad_request", f"{len(indices)} token slots given for {num_pages} pages")
    addresses, sizes = pool.get_page_buffer_meta(indices)
    pieces = len(shape.piece_bytes)
    if len(addresses) != num_pages * pieces or tuple(map(int, sizes)) != shape.piece_bytes * num_pages:
        raise StoreError("bad_request", f"the host pool describes other pages than {num_pages} of {shape.piece_bytes}")
    views = [_view(int(address), int(size)) for address, size in zip(addresses, sizes, strict=True)]
    return [views[start : start + pieces] for start in range(0, len(views), pieces)]


def _view(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def _unsupported(pool: HostPool, why: str) -> UnsupportedLayoutError:
    return UnsupportedLayoutError(
        f"this model's host pool {type(pool).__name__} cannot be stored ({why}); drop --hicache-storage-backend dynamo"
    )
