"""Where to compute and in which precision."""

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil
import torch

from captioner.errors import ConfigError


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of that name; "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device '{name}' can't be used here ({reason}); auto, cpu, cuda, cuda:N or mps was "
            "expected"
        ) from None
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of "bfloat16" or "float32"; "auto" is bfloat16 where it is native."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    return torch.bfloat16 if computes_bfloat16(device) else torch.float32


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # oneDNN alone knows whether this processor has bfloat16 instructions (AVX-512, AMX, Arm).
        # Builds without oneDNN, such as macOS's, lack the question.
        ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return bool(ask and ask())
    return False


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Return the context in which matrix products run in ``precision``."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


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
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc accepts


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free on a device: what a container may use counts, caches don't."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    limit, used = _container_memory()
    return min(available, max(0, limit - used))


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Return the memory limit of this process's container and what is used of it, in bytes.

    Files that the system could drop from its cache don't count as used. No limit is a huge one.
    """
    names = ("memory.max", "memory.current", "memory.stat", "inactive_file")  # cgroup v2
    if not (root / names[0]).is_file():
        root = root / "memory"  # cgroup v1
        names = (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "memory.stat",
            "total_inactive_file",
        )
    try:
        limit = int((root / names[0]).read_text())
        used = int((root / names[1]).read_text())
        lines = (line.split() for line in (root / names[2]).read_text().splitlines())
        return limit, used - int(dict(lines)[names[3]])
    except (OSError, ValueError, KeyError):  # "max", no cgroups, or another system
        return 1 << 62, 0


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a device, or the machine, has no memory left."""
    # On the CPU torch and oneDNN raise a plain RuntimeError, which only its text tells apart.
    texts = (
        *("can't allocate memory", "could not create a primitive", "bad_alloc"),
        *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    )
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
