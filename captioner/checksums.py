"""SHA256SUMS: what a checkpoint's files were when they were saved, so that damage is seen.

The format is that of coreutils: ``sha256sum --check SHA256SUMS`` reads it too. A file without a
line is not checked, nor is a directory without SHA256SUMS, as earlier versions wrote them.
"""

import hashlib
import re
from pathlib import Path
from typing import BinaryIO

from captioner.errors import CheckpointError
from captioner.files import atomic_write, error_naming, open_regular

CHECKSUMS_FILE = "SHA256SUMS"
MOST_BYTES = 2**20


def write_checksums(directory: Path) -> None:
    """Write the SHA-256 of each file that is in a directory."""
    with atomic_write(directory / CHECKSUMS_FILE) as checksums:
        for path in sorted(directory.iterdir()):
            if path.is_file() and path.name != CHECKSUMS_FILE and not path.name.startswith("."):
                with open_regular(path) as file:
                    checksums.write(f"{sha256_of(file)}  {path.name}\n")


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of an open file, from where it stands to its end; 1 to 2 GB/s."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_checksums(file: BinaryIO | None, directory: Path) -> dict[str, str]:
    """Return the SHA-256 by file name; none without a file.

    Raises:
        CheckpointError: It isn't such a file; the message names it and the line.
    """
    if file is None:
        return {}
    path = directory / CHECKSUMS_FILE
    with error_naming(path, CheckpointError):
        lines = file.read(MOST_BYTES).decode("utf-8").splitlines()
    checksums = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not match:
            raise CheckpointError(
                f"{path}: line {number}: 64 hexadecimal digits and a file name were expected; copy "
                "the checkpoint again, or delete this file to load it unchecked"
            )
        checksums[match[2]] = match[1]
    return checksums


def check_sha256(sha256: str, path: Path, checksums: dict[str, str]) -> None:
    """Refuse a file that isn't what was saved.

    Raises:
        CheckpointError: Its SHA-256 is another than that in ``checksums``.
    """
    if sha256 != checksums.get(path.name, sha256):
        raise CheckpointError(
            f"{path}: not what was saved, its SHA-256 differs from that in {CHECKSUMS_FILE}: copy "
            f"the checkpoint again; if you changed {path.name} yourself, delete its line there"
        )
