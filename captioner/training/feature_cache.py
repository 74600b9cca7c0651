"""The features of a frozen CNN, computed once per image and kept on disk.

A cache folder holds one store for each encoder fingerprint (CNN, weights, preprocessing,
precision, grid or pooled):

    KEY/meta.json        the fingerprint and the shape of a row
    KEY/index.jsonl      one line a row: path, size and modification time of the image file
    KEY/features.f16     the rows: float16, row after row

Rows are only ever appended, and a row's line is written after the row itself is on disk, so that
a process killed at any moment leaves a store that the next one continues. An image file that has
changed no longer matches its line and is encoded anew.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout

from captioner.data.images import PixelBatch, in_batches, load_pixels
from captioner.errors import CacheError, ImageError, name_some
from captioner.files import write_json
from captioner.models.encoder import Encoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.progress import Progress, log_line

FORMAT = 2  # 1: batch norm wasn't folded, large JPEGs weren't scaled while they were decoded
ENCODE_BATCH = 32
# Waiting for the disk after each batch would take longer than the CNN; a process that is killed
# computes at most this much again.
SECONDS_BETWEEN_SYNCS = 5.0


@dataclass(frozen=True)
class Features:
    """Features of the images of a data set, in its order.

    Attributes:
        store: All rows of the cache, memory-mapped: (rows, N, D), float16.
        rows: For each image its row in ``store``; -1 where the image couldn't be read.
    """

    store: np.ndarray
    rows: np.ndarray

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the features of these images: (B, N, D), float16. N is 1 for pooled ones."""
        rows = self.rows[list(indices)]
        if (rows < 0).any():
            raise IndexError("an image that couldn't be read has no features")
        return torch.from_numpy(self.store[rows])


def default_cache_dir() -> Path:
    """Return the user's cache folder for features (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "captioner/features"


def cached_features(
    encoder: Encoder,
    paths: Sequence[str | Path],
    cache_dir: str | Path,
    device: torch.device,
    precision: torch.dtype,
    pooled: bool = False,
    workers: int = -1,
    bad_images: str = "error",
) -> Features:
    """Return the features of images, encoding only those that the cache doesn't hold yet.

    Args:
        encoder: A frozen encoder, on ``device``.
        paths: The image files.
        cache_dir: Folder of the cache; shared by any number of encoders and data sets.
        device: Where the encoder computes.
        precision: torch.bfloat16 or torch.float32, for the encoder.
        pooled: Keep the mean over the grid alone, N times smaller.
        workers: Processes that decode images; -1 takes one a core.
        bad_images: "error" raises when images can't be read, after all others were encoded;
            "skip" reports them and goes on.

    Raises:
        ImageError: Images can't be read; names the first few and how many there are.
        CacheError: The cache is damaged, or the disk has too little room.
    """
    regions, width = encoder.grid_shape
    fingerprint = {**encoder.fingerprint(), "precision": str(precision), "pooled": pooled}
    store = _Store(Path(cache_dir), fingerprint, (1 if pooled else regions, width))
    keys = [_file_key(path) for path in paths]
    failures = [(i, f"{path}: no such file") for i, path in enumerate(paths) if keys[i] is None]
    with store.locked(), store.opened_for_append() as known:
        missing = {key: i for i, key in enumerate(keys) if key is not None and key not in known}
        if missing:
            store.check_free_space(len(missing))
            cnn, numbers = InferenceEncoder(encoder, precision), list(missing.values())
            batches = [[numbers[i] for i in b] for b in in_batches(len(numbers), ENCODE_BATCH)]
            pixels = load_pixels(paths, encoder.preprocessing, batches, device, workers)
            failures += _encode(cnn, pixels, store, keys, len(numbers), pooled)
    report_failures(failures, len(paths), bad_images)
    index = np.array([store.row_of.get(key, -1) for key in keys], dtype=np.int64)
    return Features(store.map_rows(), index)


def _encode(
    cnn: InferenceEncoder,
    pixels: Iterator[PixelBatch],
    store: "_Store",
    keys: Sequence["FileKey | None"],
    count: int,
    pooled: bool,
) -> list[tuple[int, str]]:
    """Put the features of images into the store; return those that couldn't be read, and why."""
    failures = []
    with Progress(f"encoding with {cnn.name}", count, "image") as bar:
        for batch in pixels:
            failures += batch.failures
            if batch.indices:
                grid = cnn(batch.pixels)
                rows = grid.mean(1, keepdim=True, dtype=torch.float32) if pooled else grid
                store.append([keys[i] for i in batch.indices], _to_float16(rows))
            bar.update(len(batch.indices) + len(batch.failures))
    return failures


def report_failures(failures: list[tuple[int, str]], total: int, bad_images: str) -> None:
    """Raise an ImageError for images that can't be read, or report them ("skip")."""
    if not failures:
        return
    messages = [message for _, message in sorted(failures)]
    summary = f"{len(messages)} of {total} images can't be read: {name_some(messages, 3)}"
    if bad_images == "error" or len(messages) == total:
        raise ImageError(f"{summary}; mend them, or set data.bad_images=skip to go without")
    log_line(f"warning: {summary}; they are left out")


FileKey = tuple[str, int, int]


def _file_key(path: str | Path) -> FileKey | None:
    """Return what identifies an image file's content: path, size, modification time in ns."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


def _to_float16(rows: torch.Tensor) -> np.ndarray:
    largest = torch.finfo(torch.float16).max
    return rows.float().clamp(-largest, largest).half().cpu().numpy()


class _Store:
    """The rows of one fingerprint: see the top of this file.

    Attributes:
        row_of: Row of each image file that has one.
    """

    def __init__(
        self, cache_dir: Path, fingerprint: dict[str, Any], shape: tuple[int, int]
    ) -> None:
        self.meta = {"format": FORMAT, "row": list(shape), "dtype": "float16", **fingerprint}
        text = json.dumps(self.meta, sort_keys=True)
        self.folder = cache_dir / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.shape, self.row_bytes = shape, 2 * shape[0] * shape[1]
        self.row_of: dict[FileKey | None, int] = {}
        self._rows = 0
        self._unsettled: list[bytes] = []
        self._settled_at = time.monotonic()
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_meta()

    def _check_meta(self) -> None:
        path = self.folder / "meta.json"
        if not path.exists():
            write_json(path, self.meta)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != json.loads(json.dumps(self.meta)):
            raise CacheError(
                f"{path}: describes other features than this folder is for; delete "
                f"{self.folder} and its features are computed again"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process writes here."""
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log_line(f"another process is filling {self.folder}; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def opened_for_append(self) -> Iterator[dict[FileKey | None, int]]:
        """Open both files, read the index, cut off what a killed process left half written."""
        with self._disk_errors():
            self._data = (self.folder / "features.f16").open("ab")
            self._index = (self.folder / "index.jsonl").open("ab+")
        try:
            self._read_index()
            yield self.row_of
        except BaseException:
            with contextlib.suppress(CacheError):  # keep what is whole, and tell the first error
                self._settle()
            raise
        else:
            self._settle()
        finally:
            for file in (self._data, self._index):
                with contextlib.suppress(OSError):  # what isn't settled will be computed again
                    file.close()

    def _read_index(self) -> None:
        self._index.seek(0)
        whole_rows = self._data.tell() // self.row_bytes
        good_bytes = 0
        for line in itertools.islice(self._index, whole_rows):
            key = _parse_key(line)
            if key is None:
                break
            self.row_of[key] = self._rows
            self._rows += 1
            good_bytes += len(line)
        for file, whole in ((self._index, good_bytes), (self._data, self._rows * self.row_bytes)):
            if os.fstat(file.fileno()).st_size > whole:
                file.truncate(whole)

    def append(self, keys: Sequence[FileKey | None], rows: np.ndarray) -> None:
        """Write rows (B, N, D), float16; their index lines follow when the rows are on disk."""
        with self._disk_errors():
            self._data.write(rows.tobytes())
            self._data.flush()
        self._unsettled += [json.dumps(key).encode() + b"\n" for key in keys]
        for key in keys:
            self.row_of[key] = self._rows
            self._rows += 1
        if time.monotonic() - self._settled_at >= SECONDS_BETWEEN_SYNCS:
            self._settle()

    def _settle(self) -> None:
        """Wait until the rows are on disk, then write their index lines."""
        if self._unsettled:
            with self._disk_errors():
                _to_disk(self._data)
                self._index.write(b"".join(self._unsettled))
                self._index.flush()
                _to_disk(self._index)
        self._unsettled, self._settled_at = [], time.monotonic()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self.folder}: can't be written ({error.strerror}); make room, or set "
                "data.cache_dir to another folder"
            ) from None

    def map_rows(self) -> np.ndarray:
        """Return all rows, memory-mapped: (rows, N, D), float16."""
        if not self._rows:
            return np.empty((0, *self.shape), dtype=np.float16)
        path = self.folder / "features.f16"
        return np.memmap(path, dtype=np.float16, mode="r", shape=(self._rows, *self.shape))

    def check_free_space(self, count: int) -> None:
        """Raise a CacheError when ``count`` more rows don't fit on the disk."""
        needed, free = count * self.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise CacheError(
                f"{self.folder}: features of {count} images take {needed / 1e9:.1f} GB, but "
                f"{free / 1e9:.1f} GB are free; set data.cache_dir to a larger disk"
            )
        if needed > 1e9:
            log_line(f"the feature cache in {self.folder} grows by {needed / 1e9:.1f} GB")


def _parse_key(line: bytes) -> FileKey | None:
    try:
        path, size, mtime = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (path, size, mtime) if line.endswith(b"\n") else None


def _to_disk(file: BinaryIO) -> None:
    os.fsync(file.fileno())
