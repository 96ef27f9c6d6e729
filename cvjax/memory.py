"""The memory of the machine, and the C library's heap, of which training steps take it."""

import ctypes
import os
import pathlib
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER, _PIECE = 2**31 - 1, 2**28

_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


def physical_memory() -> int | None:
    """Of the machine or its container, in bytes; None where nothing says it."""
    limits = []
    if "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if _CGROUP.is_file() and (text := _CGROUP.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits, default=None)


def keep_freed() -> bool:
    """Has the process keep what it frees, for its next allocations.

    XLA allocates the temporaries of a program each time that it runs: 300 MB in a step
    of ResNet-20. By default glibc gets such pieces from the kernel and gives them back, and
    the kernel fills each page with zeros first: 74,000 page faults per step, a quarter of
    its time on two cores. The price is that the process stays as large as it ever was.

    Returns:
      Whether it is so from now on; False away from glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {
        _ARENA_MAX: 1,  # the heap proper, which all threads share
        _MMAP_MAX: 0,
        _TRIM_THRESHOLD: _NEVER,
        _TOP_PAD: _PIECE,
    }
    done = [mallopt(name, value) for name, value in settings.items()]
    return set(done) == {1}
