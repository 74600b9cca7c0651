"""The files of the feature cache: one store for each encoder fingerprint.

    KEY/meta.json        the fingerprint (CNN, weights, preprocessing, precision, grid or pooled,
                         a view's augmentation) and the shape of a row; its modification time is
                         when it was last used
    KEY/index.jsonl      lines of [content, row, checksum, file]
    KEY/features.f16     the rows: float16, row after row
    KEY.lock             held while the store is being filled or removed

A row belongs to the content of an image file, by its hash: images that are moved, copied or
renamed keep their features, and other images under an old name don't get them. ``file`` is what
the operating system told of the file when it was hashed: as long as it tells the same, the file
isn't read. ``checksum`` is the CRC-32 of the row, verified when the row is first used.

Rows are appended, and a row's line is written after the row itself is on disk, so that a process
killed at any moment leaves a store that the next one continues. An image whose line is damaged is
encoded again, and so is one whose row is damaged: that row is overwritten, and gets another line
with its new checksum. Of two lines with the same content or row the later one holds.
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from captioner.errors import CacheError
from captioner.files import atomic_write, locked, open_regular, read_json, write_json
from captioner.progress import log_line

FORMAT = 4  # stores of another format are not read: before 4, rows belonged to paths
# Waiting for the disk after each batch would take longer than the CNN; a process that is killed
# loses at most what it computed in this time.
SECONDS_BETWEEN_SYNCS = 5.0


def default_cache_dir() -> Path:
    """Return the user's cache folder for features (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "captioner/features"


class FileStatus(NamedTuple):
    """What the operating system tells of a file without reading it.

    The change time and the inode show what size and modification time may not: a file put back
    with its old time, or two folders that have changed names.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> "FileStatus":
        """Ask for a file's status; OSError where there is none."""
        status = os.stat(path)
        times = status.st_mtime_ns, status.st_ctime_ns
        return cls(os.path.abspath(path), status.st_size, *times, status.st_ino)


def hash_file(path: str | Path) -> str:
    """Return the hash of a file's content: 32 hexadecimal digits; OSError if unreadable."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


class StoredRows:
    """The rows of a store, memory-mapped; each is compared with its checksum at its first use.

    Attributes:
        shape: (rows, N, D).
        replaced: Rows to be taken from here: those on disk are damaged and can't be written.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], checksums: np.ndarray) -> None:
        self.path, self.shape, self._checksums = path, shape, checksums
        self.replaced: dict[int, np.ndarray] = {}
        self._verified = np.zeros(len(checksums), dtype=bool)
        self._array = np.empty(shape, dtype=np.float16)
        self._map: mmap.mmap | None = None
        if len(checksums):
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            count = shape[0] * shape[1] * shape[2]
            self._array = np.frombuffer(self._map, np.float16, count).reshape(shape)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Return a copy of these rows, (B, N, D), and the places in it of damaged ones."""
        self._fetch(rows)
        values = np.asarray(self._array[rows])
        damaged = []
        for place in np.flatnonzero(~self._verified[rows]).tolist():
            row = int(rows[place])
            if row in self.replaced:
                values[place] = self.replaced[row]
            elif _checksum(values[place]) == self._checksums[row]:
                self._verified[row] = True
            else:
                damaged.append(place)
        return values, damaged

    def _fetch(self, rows: np.ndarray) -> None:
        """Have the disk begin to read all of these rows; else it would get one at a time."""
        if self._map is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        size = self._array[0].nbytes
        for row in rows.tolist():
            start = row * size // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, (row + 1) * size - start)

    def set_checksum(self, row: int, values: np.ndarray) -> None:
        """Expect these values, (N, D), in a row from now on."""
        self._checksums[row] = _checksum(values)


class FeatureStore:
    """The rows of one fingerprint: see the top of this file.

    Attributes:
        folder: Where its files are.
        row_by_content: The row of each image that has one.
        content_by_file: The hashes of files that haven't changed since.
    """

    def __init__(
        self, cache_dir: Path, fingerprint: dict[str, Any], row_shape: tuple[int, int]
    ) -> None:
        self.meta = {"format": FORMAT, "row": list(row_shape), "dtype": "float16", **fingerprint}
        text = json.dumps(self.meta, sort_keys=True)
        self.folder = cache_dir / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.meta_path = self.folder / "meta.json"
        self.index_path = self.folder / "index.jsonl"
        self.features_path = self.folder / "features.f16"
        self.row_shape, self.row_bytes = row_shape, 2 * row_shape[0] * row_shape[1]
        self._last_sync = time.monotonic()
        with self._disk_errors("read"):
            self._check_files()
            self._read_index()

    def _check_files(self) -> None:
        for path in (self.meta_path, self.index_path, self.features_path, lock_path(self.folder)):
            if path.exists() and not path.is_file():
                raise CacheError(f"{path}: a file was expected, not a folder, pipe or device")
        if not self.meta_path.exists():
            return
        problem = f"{self.meta_path}: describes other features than this folder is for"
        try:
            if read_json(self.meta_path, CacheError, regular=True) == json.loads(
                json.dumps(self.meta)
            ):
                return
        except CacheError as error:
            problem = str(error)
        raise CacheError(f"{problem}; delete {self.folder} and its features are computed again")

    def _read_index(self) -> tuple[list[bytes], list[bytes]]:
        """Read the index; return its good lines, and those that are damaged or have no row."""
        self.row_by_content: dict[str, int] = {}
        self.content_by_file: dict[FileStatus, str] = {}
        self._checksums: dict[int, int] = {}
        self._row_count = 0  # up to the last row that has a line
        good_lines: list[bytes] = []
        bad_lines: list[bytes] = []
        if not (self.index_path.exists() and self.features_path.exists()):
            return good_lines, bad_lines
        rows_on_disk = self.features_path.stat().st_size // self.row_bytes
        with open_regular(self.index_path) as file:
            for line in file:
                entry = _parse_line(line)
                if entry is None or entry[1] >= rows_on_disk:
                    bad_lines.append(line)
                else:
                    good_lines.append(line)
                    self._enter(*entry)
        return good_lines, bad_lines

    def reload(self) -> None:
        """Read what another process has written.

        Raises:
            CacheError: It can't be read.
        """
        with self._disk_errors("read"):
            self._read_index()

    def _enter(self, content: str, row: int, checksum: int, file: FileStatus | None) -> None:
        self.row_by_content[content] = row
        self._checksums[row] = checksum
        self._row_count = max(self._row_count, row + 1)
        if file:
            self.content_by_file[file] = content

    @contextlib.contextmanager
    def opened_for_append(self, wait: bool = True) -> Iterator[None]:
        """Lock the store, remove what a killed process left unfinished, open its files.

        Args:
            wait: Wait for another process that is filling the store; else raise a CacheError.
        """
        busy = f"another process is filling {self.folder}"
        with contextlib.ExitStack() as stack:
            with self._disk_errors():
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                lock = locked(
                    lock_path(self.folder), f"{busy}; waiting for it" if wait else CacheError(busy)
                )
                stack.enter_context(lock)
                self._pending_lines: list[bytes] = []
                # Only now: whoever had the lock may have removed the folder.
                if not self.meta_path.exists():
                    write_json(self.meta_path, self.meta)
                self._features_file = stack.enter_context(_closing(self.features_path))
                self._mend_files()
                self._index_file = stack.enter_context(_closing(self.index_path))
            try:
                yield
            except BaseException:
                with contextlib.suppress(CacheError):  # keep what is whole; tell the first error
                    self._sync()
                raise
            self._sync()

    def _mend_files(self) -> None:
        """Write the index without bad lines; cut off rows that have no line."""
        good_lines, bad_lines = self._read_index()
        size = self._row_count * self.row_bytes
        if os.fstat(self._features_file.fileno()).st_size > size:
            self._features_file.truncate(size)
        if bad_lines:
            with atomic_write(self.index_path, "wb") as file:
                file.writelines(good_lines)
        damaged_count = sum(line.endswith(b"\n") for line in bad_lines)
        if damaged_count:  # an unfinished last line is what a killed process leaves
            log_line(
                f"warning: {self.index_path}: {damaged_count} of "
                f"{len(good_lines) + len(bad_lines)} lines are damaged or have no features; "
                "their images are encoded again"
            )

    def append(
        self, contents: Sequence[str], rows: np.ndarray, files: Sequence[FileStatus | None]
    ) -> None:
        """Write rows (B, N, D), float16; their index lines follow when the rows are on disk.

        Args:
            contents: The hashes of the images.
            rows: Their features.
            files: Where they are; None for a file that must be hashed again.
        """
        with self._disk_errors():
            self._features_file.write(rows.tobytes())
            self._features_file.flush()
        for content, values, file in zip(contents, rows, files, strict=True):
            self._add_line(content, self._row_count, _checksum(values), file)
        if time.monotonic() - self._last_sync >= SECONDS_BETWEEN_SYNCS:
            self._sync()

    def rewrite(self, row: int, content: str, values: np.ndarray) -> None:
        """Write the features of an image, (N, D), over its damaged row."""
        if self.row_by_content.get(content) != row:
            raise CacheError(f"{self.folder}: has been removed or filled anew")
        with self._disk_errors(), self.features_path.open("r+b") as file:
            file.seek(row * self.row_bytes)
            file.write(values.tobytes())
        self._add_line(content, row, _checksum(values), None)

    def remember(self, content: str, file: FileStatus) -> None:
        """Note the hash of a file, whose image has a row."""
        row = self.row_by_content[content]
        self._add_line(content, row, self._checksums[row], file)

    def _add_line(self, content: str, row: int, checksum: int, file: FileStatus | None) -> None:
        self._pending_lines.append(json.dumps([content, row, checksum, file]).encode() + b"\n")
        self._enter(content, row, checksum, file)

    def _sync(self) -> None:
        """Wait until the rows are on disk, then write their index lines."""
        if self._pending_lines:
            with self._disk_errors():
                _fsync(self._features_file)
                self._index_file.write(b"".join(self._pending_lines))
                self._index_file.flush()
                _fsync(self._index_file)
        self._pending_lines, self._last_sync = [], time.monotonic()

    @contextlib.contextmanager
    def _disk_errors(self, action: str = "written") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self.folder}: can't be {action} ({error.strerror}); check its permissions and "
                "the free space, or set data.cache_dir to another folder"
            ) from None

    def map_rows(self) -> StoredRows:
        """Return all rows, memory-mapped, and note that the store is in use."""
        with contextlib.suppress(OSError):  # a store on a read-only disk is as good
            os.utime(self.meta_path)
        checksums = np.zeros(self._row_count, dtype=np.uint32)
        checksums[list(self._checksums)] = list(self._checksums.values())
        with self._disk_errors("read"):
            return StoredRows(self.features_path, (len(checksums), *self.row_shape), checksums)

    def check_free_space(self, count: int) -> None:
        """Raise a CacheError when ``count`` more rows don't fit on the disk."""
        needed, free = count * self.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise CacheError(
                f"{self.folder}: features of {count} images take {needed / 1e9:.1f} GB, but "
                f"{free / 1e9:.1f} GB are free; see 'captioner cache list' for what can be "
                "removed, or set data.cache_dir to a larger disk"
            )
        if needed > 1e9:
            log_line(f"the feature cache in {self.folder} grows by {needed / 1e9:.1f} GB")
            stores = list_stores(self.folder.parent)
            unused = sum(store.size for store in stores if not store.in_use)
            if unused:
                log_line(f"'captioner cache prune --old' frees {unused / 1e9:.1f} GB of old ones")


def lock_path(folder: Path) -> Path:
    """Return a store's lock file: outside its folder, so that it outlives the folder's removal."""
    return folder.with_name(f"{folder.name}.lock")


@dataclass(frozen=True)
class StoreInfo:
    """What can be told of a store without reading its rows.

    Attributes:
        folder: Where its files are.
        encoder: The CNN by its torchvision name; "" where meta.json is damaged.
        details: Preprocessing, grid or pooled, and precision, in short.
        in_use: It has today's format; others are never read.
        images: Number of rows.
        size: Bytes on disk.
        last_used: Seconds since 1970.
    """

    folder: Path
    encoder: str
    details: str
    in_use: bool
    images: int
    size: int
    last_used: float


def list_stores(cache_dir: Path) -> list[StoreInfo]:
    """Return the stores of a cache folder; none where there is no such folder.

    Raises:
        CacheError: It can't be read.
    """
    if not cache_dir.exists():
        return []
    try:
        folders = [path for path in sorted(cache_dir.iterdir()) if path.is_dir()]
        return [_store_info(path) for path in folders if re.fullmatch("[0-9a-f]{16}", path.name)]
    except OSError as error:
        raise CacheError(f"{cache_dir}: can't be read ({error.strerror})") from None


def _store_info(folder: Path) -> StoreInfo:
    sizes = {path.name: path.lstat().st_size for path in folder.iterdir()}
    meta_path = folder / "meta.json"
    last_used = (meta_path if meta_path.exists() else folder).stat().st_mtime
    encoder, details, in_use, images = "", "damaged", False, 0
    with contextlib.suppress(CacheError, KeyError, TypeError, ValueError):
        meta = read_json(meta_path, CacheError, regular=True)
        regions, width = map(int, meta["row"])
        resize, size = meta["preprocessing"]["resize"], meta["preprocessing"]["image_size"]
        grid = "pooled" if meta["pooled"] else f"{regions} regions"
        precision = str(meta["precision"]).removeprefix("torch.")
        details = f"{resize} {size}, {grid} of {width}, {precision}"
        if "augmentation" in meta:
            details += f", view {meta['augmentation']['view'] + 1}"
        encoder = " ".join(filter(None, [meta["encoder"], meta["last_stage"]]))
        in_use = meta["format"] == FORMAT
        images = sizes.get("features.f16", 0) // (2 * regions * width)
    return StoreInfo(folder, encoder, details, in_use, images, sum(sizes.values()), last_used)


def remove_store(folder: Path) -> None:
    """Remove a store; a process that has its rows open keeps them until it ends.

    Raises:
        CacheError: Another process is filling it, or it can't be removed.
    """
    busy = CacheError(f"{folder}: another process is filling it; not removed")
    lock_of_format_3 = folder / "lock"
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(lock_path(folder), busy))
            if lock_of_format_3.exists():
                stack.enter_context(locked(lock_of_format_3, busy))
            shutil.rmtree(folder)
    except OSError as error:
        raise CacheError(f"{folder}: can't be removed ({error.strerror or error})") from None


def _parse_line(line: bytes) -> tuple[str, int, int, FileStatus | None] | None:
    """Return an index line's values; None for a damaged or unfinished line."""
    try:
        content, row, checksum, file = json.loads(line)
        status = None if file is None else FileStatus(*file)
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = (row, checksum, *(status[1:] if status else ()))
    texts = (content, *(status[:1] if status else ()))
    valid = all(type(number) is int for number in numbers) and all(
        type(text) is str for text in texts
    )
    whole = valid and line.endswith(b"\n") and row >= 0 and 0 <= checksum < 1 << 32
    return (content, row, checksum, status) if whole else None


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data)


@contextlib.contextmanager
def _closing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for appending; what can't be written when it is closed has no index line."""
    file = path.open("ab")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _fsync(file: BinaryIO) -> None:
    os.fsync(file.fileno())
