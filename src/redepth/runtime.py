"""What the machine offers: dtypes, bf16 products, memory."""

import ctypes
import importlib.util
import platform

import torch

from redepth.errors import RedepthError, first_line

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        RedepthError: for a name that is not in `DTYPES`.
    """
    if name not in DTYPES:
        raise RedepthError(f"dtype {name!r} is unknown; use {', '.join(DTYPES)}, or leave it out")
    return DTYPES[name]


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; `auto` is a CUDA GPU where there is one, and else the processor.

    Raises:
        RedepthError: for an unknown device, or one that this machine or this build of torch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RedepthError("device 'meta' holds no numbers; use cpu, cuda or auto")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RedepthError(f"device {str(name)!r} can't be used: {first_line(error)}; use cpu or auto") from None
    return device


def has_bf16(device: str | torch.device = "auto") -> bool:
    """Whether a device has native bf16 matrix products, not emulated ones."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next tensor instead of returning them to the kernel.

    Each training step frees and allocates the same gigabytes of activations, and on a CPU every page
    that comes from the kernel has to be zeroed first. Holds for the whole process; peak memory hardly changes.

    Returns:
        False where the C library is another one, and nothing was done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def require(package: str, extra: str) -> None:
    """Check at the start for a package that only some calls need.

    Raises:
        RedepthError: where the package is not installed, with what to install.
    """
    if importlib.util.find_spec(package) is None:
        raise RedepthError(f"this needs the package {package}; run: pip install 'redepth[{extra}]'")
