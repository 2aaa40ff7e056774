"""What the C library does with freed memory: kept between batches, given back when a stage ends.

By default glibc returns the arrays of each batch to the system and asks for them again with the next one,
page by page, which costs a few percent of tokenizing. Elsewhere (musl, macOS) nothing is changed.
"""

import ctypes
import functools

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Names and values of glibc's `malloc.h`."""
KEPT_BYTES = 64 << 20
"""Free memory at the end of the heap that is kept."""


@functools.cache
def keep_freed_memory() -> None:
    """Let this process use the memory of one batch again for the next."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_TOP_PAD, 16 << 20)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)


def give_memory_back() -> None:
    """Let the system have what was freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Give the memory of this process that is in use."""
    import psutil

    return psutil.Process().memory_info().rss
