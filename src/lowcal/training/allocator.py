"""The C library's allocator, told to keep what training frees, since the next step asks for the same again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep_freed_memory() -> bool:
    """Lets this process keep memory that it has freed; the peak stays as it is.

    By default glibc gives large blocks back to the system and gets them anew, so that each training step on the CPU
    writes to pages that the system must first find and clear. torch takes its CPU memory from there.

    Returns:
        Whether the C library can be told so; elsewhere nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_MMAP_MAX, 0))
