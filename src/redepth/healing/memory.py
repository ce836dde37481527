"""What the C library does with the memory that training frees."""

import ctypes
import platform

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next tensor instead of returning them to the kernel.

    A training step frees and takes the same gigabytes of activations again and again, and on a processor every page
    that comes fresh from the kernel must be zeroed first. Holds for the whole process; peak memory hardly changes.

    Returns:
        False where the C library is another one, and nothing was done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
