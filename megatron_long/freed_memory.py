"""The C library's freed memory: kept for the next batch or tensor, returned to the system after a stage.

By default glibc returns large blocks to the system at once, and the system is slow to allocate new pages:
a few percent of tokenizing, and more than the disk takes to fill them. Elsewhere (musl, macOS) nothing is
changed.
"""

import ctypes
import functools
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8
"""Names and values of glibc's `malloc.h`."""
KEPT_BYTES = 64 << 20
"""Free memory at the end of the heap that is kept between batches."""


@functools.cache
def keep_batch_memory() -> None:
    """Make this process reuse the memory of one batch of texts for the next."""
    _set_malloc({M_TRIM_THRESHOLD: KEPT_BYTES, M_TOP_PAD: 16 << 20, M_MMAP_THRESHOLD: 32 << 20})


def keep_tensor_memory() -> None:
    """Make this process, which reads one large tensor after the other, reuse their memory."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for torch's tensors
    # With one arena, other threads can reuse what one thread frees.
    _set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1})


def _set_malloc(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def give_memory_back() -> None:
    """Return freed memory to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Return the memory of this process that is in use."""
    import psutil

    return psutil.Process().memory_info().rss
