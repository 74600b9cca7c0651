"""Where to compute, in which precision, and in how much memory."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import psutil
import torch

from captioner.errors import ConfigError, TrainingError


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


def has_bfloat16_tiles(device: torch.device) -> bool:
    """Tell whether a device multiplies whole tiles of bfloat16: GPUs, and CPUs with AMX."""
    if device.type != "cpu":
        return True
    ask = getattr(torch.cpu, "get_capabilities", None)  # older versions lack it
    return bool(ask and ask().get("amx_bf16"))


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Return the context in which matrix products run in ``precision``."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which nothing is cast, for code that has chosen its dtypes itself."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: torch.dtype, deterministic: bool) -> Iterator[None]:
    """Set how a GPU computes, until the context ends.

    Args:
        device: What computes; nothing is changed for others than GPUs.
        precision: With torch.bfloat16 the matrix products that stay in float32 are computed in
            TensorFloat-32.
        deterministic: Have operations give the same bits each time on one kind of GPU with the same
            software; torch warns of those that have no such version.
    """
    if device.type != "cuda":
        yield
        return
    before = (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )
    if precision == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.backends.cudnn.benchmark = before[2]


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free on a device.

    Of the machine's memory, what this process may still have: its containers (cgroups) and its
    address space (``ulimit -v``) may be limited. What the system keeps of files in its cache counts
    as free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    try:
        cgroups = Path("/proc/self/cgroup").read_text()
    except OSError:  # another system
        return min(available, _free_address_space())
    return min(available, _free_address_space(), free_in_cgroups(Path("/sys/fs/cgroup"), cgroups))


UNLIMITED = 1 << 62


def free_in_cgroups(root: Path, cgroups: str) -> int:
    """Return how many bytes the control groups of a process leave it.

    A group's limit holds for all groups below it too: the tightest counts.

    Args:
        root: Where the groups are mounted, ``/sys/fs/cgroup``.
        cgroups: Which are the process's own: the content of ``/proc/self/cgroup``.

    Returns:
        Bytes, at least 0; a huge number where nothing is limited.
    """
    free = UNLIMITED
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounted, free_in_group = root, _free_in_cgroup_v2
        elif "memory" in controllers.split(","):
            mounted, free_in_group = root / "memory", _free_in_cgroup_v1
        else:
            continue
        # In a container its own group may be mounted as the root: then only the root is there.
        relative = PurePosixPath(path.lstrip("/"))
        parts = [] if ".." in relative.parts else [relative, *relative.parents]
        for part in [*parts, PurePosixPath()]:
            free = min(free, free_in_group(mounted / part))
    return max(0, free)


def _free_in_cgroup_v2(group: Path) -> int:
    # Beyond "high" processes are slowed down until they stand still.
    limit = min(_read_number(group / name, UNLIMITED) for name in ("memory.max", "memory.high"))
    used = _read_number(group / "memory.current", 0)
    return limit - used + _file_cache(group, "active_file", "inactive_file")


def _free_in_cgroup_v1(group: Path) -> int:
    limit = _read_number(group / "memory.limit_in_bytes", UNLIMITED)
    used = _read_number(group / "memory.usage_in_bytes", 0)
    return limit - used + _file_cache(group, "total_active_file", "total_inactive_file")


def _read_number(path: Path, otherwise: int) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group; "max"
        return otherwise


def _file_cache(group: Path, *names: str) -> int:
    """Return the bytes of files that the system may drop from its cache when memory is wanted."""
    try:
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return sum(int(value) for name, value in lines if name in names)
    except (OSError, ValueError):
        return 0


def _free_address_space() -> int:
    """Return how many bytes this process may still reserve (``ulimit -v``)."""
    try:
        import resource  # not on Windows
    except ImportError:
        return UNLIMITED
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return UNLIMITED
    return max(0, limit - psutil.Process().memory_info().vms)


# On the CPU torch and oneDNN raise a plain RuntimeError, CUDA's libraries one with their status:
# only the text tells them apart.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|could not) allocate memory|bad_alloc"
    r"|could not create a (primitive(?! descriptor)|memory object)|_ALLOC(ATION)?_FAILED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a device, or the machine, has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


@contextlib.contextmanager
def memory_errors(message: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error into a ``TrainingError`` with what ``message`` returns."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory {message()}") from None
