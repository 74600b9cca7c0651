"""The features of a frozen CNN, computed once per image and kept on disk.

A cache folder holds one store for each encoder fingerprint (CNN, weights, preprocessing,
precision, grid or pooled):

    KEY/meta.json        the fingerprint and the shape of a row
    KEY/index.jsonl      one line per row: path, size and modification time of the image file,
                         and the number of the row
    KEY/features.f16     the rows: float16, row after row

Rows are only ever appended, and a row's line is written after the row itself is on disk, so that
a process killed at any moment leaves a store that the next one continues. An image file that has
changed no longer matches its line and is encoded again. So is an image whose line is damaged.
"""

import contextlib
import hashlib
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

from captioner.data.images import PixelBatch, in_batches, load_pixels
from captioner.errors import CacheError, ImageError, name_some
from captioner.files import atomic_write, locked, read_json, write_json
from captioner.models.encoder import Encoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.progress import Progress, log_line

FORMAT = 3  # stores of another format are not read: before 3, index lines had no row number
ENCODE_BATCH_SIZE = 32
# Waiting for the disk after each batch would take longer than the CNN; a process that is killed
# loses at most what it computed in this time.
SECONDS_BETWEEN_SYNCS = 5.0

ImageKey = tuple[str, int, int]  # path, size in bytes, modification time in ns


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
        pooled: Keep only the mean over the grid, N times smaller.
        workers: Processes that decode images; -1 takes one per core.
        bad_images: "error" raises when images can't be read, after all others were encoded;
            "skip" reports them and goes on.

    Raises:
        ImageError: Images can't be read; names the first few and how many there are.
        CacheError: The cache is damaged, or the disk has too little room.
    """
    regions, width = encoder.grid_shape
    fingerprint = {**encoder.fingerprint(), "precision": str(precision), "pooled": pooled}
    store = _FeatureStore(Path(cache_dir), fingerprint, (1 if pooled else regions, width))
    keys = [_image_key(path) for path in paths]
    failures = [(i, f"{path}: no such file") for i, path in enumerate(paths) if keys[i] is None]
    with store.locked(), store.opened_for_append():
        missing = {key: i for i, key in enumerate(keys) if key and key not in store.row_by_key}
        if missing:
            store.check_free_space(len(missing))
            key_by_index = {i: key for key, i in missing.items()}
            indices = list(key_by_index)
            encoded = _encode(encoder, paths, indices, device, precision, pooled, workers)
            for batch, batch_rows in encoded:
                failures += batch.failures
                store.append([key_by_index[i] for i in batch.indices], batch_rows)
    report_failures(failures, len(paths), bad_images)
    rows = [-1 if key is None else store.row_by_key.get(key, -1) for key in keys]
    return Features(store.map_rows(), np.array(rows, dtype=np.int64))


def report_failures(failures: list[tuple[int, str]], total: int, bad_images: str) -> None:
    """Raise an ImageError for images that can't be read, or report them ("skip")."""
    if not failures:
        return
    messages = [message for _, message in sorted(failures)]
    summary = f"{len(messages)} of {total} images can't be read: {name_some(messages, 3)}"
    if bad_images == "error" or len(messages) == total:
        raise ImageError(f"{summary}; mend them, or set data.bad_images=skip to go without")
    log_line(f"warning: {summary}; they are left out")


def _image_key(path: str | Path) -> ImageKey | None:
    """Return what identifies an image file and its content; None if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


def _encode(
    encoder: Encoder,
    paths: Sequence[str | Path],
    indices: Sequence[int],
    device: torch.device,
    precision: torch.dtype,
    pooled: bool,
    workers: int,
) -> Iterator[tuple[PixelBatch, np.ndarray]]:
    """Yield the images at these indices in batches, with their rows: (B, N, D), float16.

    B may be less than the size of the batch, and 0: images that can't be read have no row.
    """
    cnn = InferenceEncoder(encoder, precision)
    ranges = in_batches(len(indices), ENCODE_BATCH_SIZE)
    batches = [[indices[i] for i in batch_range] for batch_range in ranges]
    with Progress(f"encoding with {encoder.name}", len(indices), "image") as bar:
        for batch in load_pixels(paths, encoder.preprocessing, batches, device, workers):
            rows = np.empty(0, dtype=np.float16)
            if batch.indices:
                grid = cnn(batch.pixels)
                rows = _to_float16(grid.mean(1, True, dtype=torch.float32) if pooled else grid)
            yield batch, rows
            bar.update(len(batch.indices) + len(batch.failures))


def _to_float16(rows: torch.Tensor) -> np.ndarray:
    largest = torch.finfo(torch.float16).max
    return rows.float().clamp(-largest, largest).half().cpu().numpy()


class _FeatureStore:
    """The rows of one fingerprint: see the top of this file.

    Attributes:
        row_by_key: The row of each image file that has one.
    """

    def __init__(
        self, cache_dir: Path, fingerprint: dict[str, Any], row_shape: tuple[int, int]
    ) -> None:
        self.meta = {"format": FORMAT, "row": list(row_shape), "dtype": "float16", **fingerprint}
        text = json.dumps(self.meta, sort_keys=True)
        self.folder = cache_dir / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.features_path = self.folder / "features.f16"
        self.index_path = self.folder / "index.jsonl"
        self.row_shape, self.row_bytes = row_shape, 2 * row_shape[0] * row_shape[1]
        self.row_by_key: dict[ImageKey, int] = {}
        self._row_count = 0
        self._pending_lines: list[bytes] = []
        self._last_sync = time.monotonic()
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_meta()

    def _check_meta(self) -> None:
        path = self.folder / "meta.json"
        if not path.exists():
            write_json(path, self.meta)
        if read_json(path, CacheError) != json.loads(json.dumps(self.meta)):
            raise CacheError(
                f"{path}: describes other features than this folder is for; delete "
                f"{self.folder} and its features are computed again"
            )

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Wait until no other process writes here."""
        return locked(
            self.folder / "lock", f"another process is filling {self.folder}; waiting for it"
        )

    @contextlib.contextmanager
    def opened_for_append(self) -> Iterator[None]:
        """Read the index, remove what a killed process left unfinished, open both files."""
        with self._disk_errors():
            self._features_file = self.features_path.open("ab")
            self._read_index()
            if _size(self._features_file) > self._row_count * self.row_bytes:
                self._features_file.truncate(self._row_count * self.row_bytes)
            self._index_file = self.index_path.open("ab")
        try:
            yield
        except BaseException:
            with contextlib.suppress(CacheError):  # keep what is whole, and tell the first error
                self._sync()
            raise
        else:
            self._sync()
        finally:
            for file in (self._features_file, self._index_file):
                with contextlib.suppress(OSError):  # what has no line will be encoded again
                    file.close()

    def _read_index(self) -> None:
        """Read the lines that have a row; write the index without the others if there are any."""
        if not self.index_path.exists():
            return
        rows_on_disk = _size(self._features_file) // self.row_bytes
        good_lines, bad_lines = [], []
        with self.index_path.open("rb") as file:
            for line in file:
                key, row = _parse_line(line) or (None, -1)
                if key is None or not 0 <= row < rows_on_disk:
                    bad_lines.append(line)
                    continue
                good_lines.append(line)
                self.row_by_key[key] = row
                self._row_count = max(self._row_count, row + 1)
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

    def append(self, keys: Sequence[ImageKey], rows: np.ndarray) -> None:
        """Write rows (B, N, D), float16; their index lines follow when the rows are on disk."""
        with self._disk_errors():
            self._features_file.write(rows.tobytes())
            self._features_file.flush()
        for key in keys:
            self._pending_lines.append(json.dumps([*key, self._row_count]).encode() + b"\n")
            self.row_by_key[key] = self._row_count
            self._row_count += 1
        if time.monotonic() - self._last_sync >= SECONDS_BETWEEN_SYNCS:
            self._sync()

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
        shape = (self._row_count, *self.row_shape)
        if not self._row_count:
            return np.empty(shape, dtype=np.float16)
        return np.memmap(self.features_path, dtype=np.float16, mode="r", shape=shape)

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


def _parse_line(line: bytes) -> tuple[ImageKey, int] | None:
    """Return an index line's image and row; None for a damaged or unfinished line."""
    try:
        path, size, mtime, row = json.loads(line)
    except (ValueError, TypeError):
        return None
    valid = isinstance(path, str) and all(type(value) is int for value in (size, mtime, row))
    return ((path, size, mtime), row) if valid and line.endswith(b"\n") else None


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _fsync(file: BinaryIO) -> None:
    os.fsync(file.fileno())
