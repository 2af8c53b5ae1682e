"""glibc's allocator, told to keep what it is given back."""

import ctypes
import platform

# Of glibc's malloc.h, with the values that keep every page: none mapped apart, none trimmed, room at the top, and one
# heap for all threads, whose freed memory any of them can take.
_OPTIONS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28), "M_ARENA_MAX": (-8, 1)}


def keep_pages() -> bool:
    """Makes freed memory stay with the process; returns whether it could, which other C libraries cannot.

    A large array is otherwise mapped anew each time one is made, and the kernel clears it page by page on first touch,
    which takes as long as an elementwise function of it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) for option, value in _OPTIONS.values())
