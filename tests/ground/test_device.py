import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from captioner.device import keep_freed_memory
if sys.argv[1] == "limit":
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
if sys.argv[1] != "leave":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(1, 31):  # MiB; each beyond all that glibc has seen
    torch.ones(size << 18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    """The system hands memory out in pages; how many it handed out, it counts."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert 5 * faults("keep") < faults("leave")
    assert 5 * faults("keep") < faults("limit")
