"""glibc's allocator, told to keep what is freed.

By default it hands every freed block of some megabytes back to the system, and takes it again page by page for the next
tensor: on the miniature 11,600 page faults a forward, a third of the time of sampling.
"""

import ctypes

# Of mallopt(3); blocks above 32 MiB, the most it takes, are mapped one by one as before.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST, _NEVER = 32 << 20, (1 << 31) - 1


def keep_freed_memory() -> bool:
    """For the whole process; call it before the first tensor. False where the C library is another one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all((mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, _NEVER)))
