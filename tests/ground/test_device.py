"""Devices: their memory, what running out of it looks like, and bfloat16."""

import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from captioner.device import (
    computes_bfloat16,
    free_in_cgroups,
    free_memory,
    is_out_of_memory,
)

CPU = torch.device("cpu")
GIB = 1 << 30

FAULTS = """
import resource, sys, torch
from captioner.memory import keep_freed_memory
if sys.argv[1] == "limit":
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
if sys.argv[1] != "leave":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(1, 31):  # MiB; each beyond all that glibc has seen
    torch.ones(size << 18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    """The system hands memory out in pages; how many it handed out, it counts."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert 5 * faults("keep") < faults("leave")
    assert 5 * faults("keep") < faults("limit")


COMMANDS = """
import ctypes, sys
from pathlib import Path
import torch

called = []
load = ctypes.CDLL
ctypes.CDLL = lambda name, *rest, **more: called.append(name) or load(name, *rest, **more)
from captioner import Captioner
Captioner.from_pretrained(sys.argv[1], "cpu").caption(sys.argv[2])
library = called.count(None)
from captioner.commands import caption
caption.main([sys.argv[1], str(Path(sys.argv[2]).parent), "--output", sys.argv[3]])
print(library, called.count(None) - library)
"""


def test_only_commands_change_how_the_process_keeps_memory(checkpoint, drawn, tmp_path):
    """``mallopt`` is found through ``CDLL(None)``, which nothing else asks for."""
    words = [checkpoint, drawn.paths[0], tmp_path / "captions.json"]
    command = [sys.executable, "-c", COMMANDS, *map(str, words)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "0 1"


# --- free memory ------------------------------------------------------------------------------


def make_group(group: Path, names: dict[str, object]) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, value in names.items():
        (group / name).write_text(f"{value}\n")


def group_v2(group: Path, limit: object, used: int, cached: int = 0, high: object = "max") -> None:
    stat = f"anon {used - cached}\nfile {cached}\ninactive_file {cached - 7}\nactive_file 7"
    content = {"memory.max": limit, "memory.high": high, "memory.current": used}
    make_group(group, {**content, "memory.stat": stat})


def group_v1(group: Path, limit: int, used: int, cached: int = 0) -> None:
    stat = f"inactive_file 5\ntotal_inactive_file {cached - 7}\ntotal_active_file 7"
    content = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
    make_group(group, {**content, "memory.stat": stat})


NO_LIMIT_V1 = 9223372036854771712  # what the kernel writes


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((8 * GIB, "max", "max"), 6 * GIB),  # the outermost group's
        (("max", 8 * GIB, "max"), 6 * GIB),
        (("max", "max", 3 * GIB), 1 * GIB),  # its own
        ((8 * GIB, 4 * GIB, 6 * GIB), 2 * GIB),
        (("max", "max", 1 * GIB), 0),  # used up, and more
    ],
)
def test_the_tightest_cgroup_above_a_process_counts(tmp_path, limits, expected):
    """Version 2; each group uses 3 GiB, one of them for files that can be dropped."""
    (tmp_path / "cgroup.controllers").write_text("memory")  # the root has no limit of its own
    group = tmp_path
    for name, limit in zip(("user.slice", "job 7: a", "step"), limits, strict=True):
        group /= name
        group_v2(group, limit, 3 * GIB, cached=1 * GIB)
    group_v2(tmp_path / "user.slice/other", 1, 1)  # no parent of it
    assert free_in_cgroups(tmp_path, "0::/user.slice/job 7: a/step\n") == expected


def test_where_a_cgroup_is_slowed_down_is_its_limit(tmp_path):
    group_v2(tmp_path / "a", 8 * GIB, 1 * GIB, high=2 * GIB)
    assert free_in_cgroups(tmp_path, "0::/a\n") == 1 * GIB


def test_cgroups_of_version_1(tmp_path):
    lines = "11:cpu,cpuacct:/elsewhere\n4:memory:/batch/job\n1:name=systemd:/x\n0::/\n"
    group_v1(tmp_path / "memory", NO_LIMIT_V1, 9 * GIB)
    group_v1(tmp_path / "memory/batch", 8 * GIB, 5 * GIB, cached=2 * GIB)
    group_v1(tmp_path / "memory/batch/job", 6 * GIB, 2 * GIB)
    assert free_in_cgroups(tmp_path, lines) == 4 * GIB
    group_v1(tmp_path / "memory/batch", 6 * GIB, 5 * GIB, cached=2 * GIB)
    assert free_in_cgroups(tmp_path, lines) == 3 * GIB


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/../../other", "/gone (deleted)"])
def test_in_a_container_its_cgroup_is_the_root(tmp_path, path):
    group_v2(tmp_path, 4 * GIB, 1 * GIB)
    assert free_in_cgroups(tmp_path, f"0::{path}\n") == 3 * GIB
    group_v1(tmp_path / "memory", 2 * GIB, 1 * GIB)
    assert free_in_cgroups(tmp_path, f"4:memory:{path}\n0::{path}\n") == 1 * GIB


def test_no_cgroups_are_no_limit(tmp_path):
    assert free_in_cgroups(tmp_path, "") > 1 << 60
    assert free_in_cgroups(tmp_path / "missing", "0::/a\n4:memory:/b\n") > 1 << 60


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="needs Linux, which has cgroups")
def test_the_cgroups_of_this_process_can_be_read():
    cgroups = Path("/proc/self/cgroup").read_text()
    free = free_in_cgroups(Path("/sys/fs/cgroup"), cgroups)
    assert free > 0
    before = psutil.virtual_memory().available
    found = free_memory(CPU)
    assert 0 < found <= max(before, psutil.virtual_memory().available) * 1.1
    if free > before * 2:  # nothing is limited here
        assert found > before / 2


LIMITED = """
import resource, torch
from captioner.device import free_memory

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
free = free_memory(torch.device("cpu"))
blocks = [bytearray(free - (2 << 20))]  # so much is there ...
try:
    blocks.append(bytearray(8 << 20))  # ... and no more
except MemoryError:
    print(free >> 20)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux: ulimit -v is its own"
)
def test_a_limit_on_the_address_space_counts():
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 280 <= int(run.stdout) <= 300


# --- out of memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to …"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.66 GiB, other allocations: …"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
    ],
    ids=lambda error: str(error)[:50],
)
def test_what_running_out_of_memory_looks_like(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_what_is_another_error(error):
    assert not is_out_of_memory(error)


def test_the_real_error_of_the_cpu_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)


# --- bfloat16 ---------------------------------------------------------------------------------


def test_builds_without_onednn_have_no_bfloat16(monkeypatch):
    """macOS's, say: the question itself is missing there."""
    assert computes_bfloat16(CPU) in (True, False)
    without = type(torch.ops)()  # a namespace in which no operator is registered
    monkeypatch.setattr(torch.ops, "mkldnn", without.nothing_registered_here)
    assert not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    assert computes_bfloat16(CPU) is False
