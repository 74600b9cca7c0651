"""Text files beside the images, with their captions: ``dog.txt`` beside ``dog.jpg``.

It is the form that trainers of diffusion models read. A file that this tool did not write, or that
somebody has changed since, is left as it is, unless told otherwise.
"""

import errno
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from captioner.files import atomic_write
from captioner.inference.journal import Journal, key_of
from captioner.inference.records import Record
from captioner.progress import log_line

SUFFIX = ".txt"
FULL = {errno.ENOSPC, errno.EDQUOT}  # of disks


class Sidecars:
    """Writes captions beside their images.

    Args:
        journal: Tells which files this tool wrote, and with what in them.
        overwrite: Whether other files are overwritten too.

    Attributes:
        left: How many files were left as they were.
    """

    def __init__(self, journal: Journal, overwrite: bool = False) -> None:
        self._journal, self._overwrite = journal, overwrite
        self.left = 0

    def write(self, records: Iterable[Record]) -> None:
        """Write the files of captioned images; each appears whole or not at all."""
        # Of a.jpg and a.png, which share a file, the first has it.
        by_path: dict[Path, Record] = {}
        captioned = [record for record in records if not record.error]
        for record in captioned:
            by_path.setdefault(_path(record), record)
        known = [self._journal.sidecar(str(_path(record))) for record in captioned]

        def write(record: Record, known: Sequence[str] | None) -> str:
            return self._write_one(record, known) if by_path[_path(record)] is record else ""

        with ThreadPoolExecutor(8) as threads:  # the disk takes many at a time in one go
            written = list(threads.map(write, captioned, known))
        self.left += written.count("")
        paths = [str(_path(record)) for record in captioned]
        self._journal.keep_sidecars(zip(captioned, paths, written, strict=True))

    def write_missing(self) -> None:
        """Write those of images that were captioned before, in a run that was cut off say."""
        while records := self._journal.records_without("sidecar"):
            self.write(records)

    def _write_one(self, record: Record, known: Sequence[str] | None) -> str:
        """Write a file, if that is allowed; return the SHA-256 of its content, or ""."""
        path, content = _path(record), f"{record.captions[0].text}\n".encode()
        digest = hashlib.sha256(content).hexdigest()
        found = _digest(path)
        if found == digest:
            return digest
        is_ours = known is not None and known[1] == found and known[0] == key_of(record.image_id)
        if found and not is_ours and not self._overwrite:
            return ""
        try:
            with atomic_write(path, "wb") as file:
                file.write(content)
        except OSError as error:
            if error.errno in FULL:
                raise
            log_line(f"warning: {path}: can't be written ({error.strerror})")
            return ""
        return digest


def _path(record: Record) -> Path:
    return Path(record.path).with_suffix(SUFFIX)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file's content; "" of none, "?" of one that can't be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
    except OSError:
        return "?"
