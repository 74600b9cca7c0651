"""What the C library does with memory that is freed."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Have this process keep the memory of freed tensors for the next ones, as on a GPU.

    glibc gives large blocks back to the system, which hands them out again in pages of 4 KiB, each
    at the price of an interrupt: a tensor of 16 MB costs more to receive than to fill. Where the
    C library is another one nothing is changed, and neither where a process may not grow at will
    (``ulimit -v``): what is kept in one size can't be had in another.
    """
    if not sys.platform.startswith("linux"):
        return
    import resource  # not on Windows

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
        mallopt(arena_max, 1)  # else each thread that reads images would keep its own
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc accepts


def give_back_freed_memory() -> None:
    """Have the C library return what it keeps of freed memory to the system, if it is glibc."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
