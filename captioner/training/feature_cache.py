"""The features of a frozen CNN, computed once per image and kept on disk.

``feature_store`` has the files; here is what comes before and after them: which image files have
features already, encoding those that don't, and handing features out in batches. Images that are
changed at random have several views, each with a store of its own.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from captioner.config import AugmentationConfig
from captioner.data.augmentation import of_view
from captioner.data.images import Augment, in_batches, load_pixels
from captioner.errors import CacheError, ImageError, name_some
from captioner.models.encoder import Encoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.progress import Progress, log_line, progress_iter
from captioner.training.feature_store import FeatureStore, FileStatus, StoredRows, hash_file

ENCODE_BATCH_SIZE = 32
HASHING_THREADS = 8
# File systems note times in steps of up to 2 s: a file that was written just now may be written
# again and look the same. Its hash isn't remembered.
SETTLED_NS = 2_000_000_000
# How long more images than these will take is measured beforehand, on so many batches.
MANY_IMAGES, TIMED_BATCHES = 1000, 3

Failures = list[tuple[int, str]]  # images that can't be read: index and message


@dataclass(frozen=True, slots=True)
class _ImageFile:
    """An image file that was hashed, now or earlier.

    Attributes:
        content: The hash.
        status: What it looked like from outside just before.
        settled: Any later change would show in its status.
    """

    content: str
    status: FileStatus
    settled: bool


@dataclass(frozen=True)
class Features:
    """Features of the images of a data set, in its order.

    A row that has changed on disk is noticed when it is first used; its image is encoded again.

    Attributes:
        rows: For each image its row in the store; -1 where the image couldn't be read.
        stored: The rows.
        images: The number of each image in ``encoder``.
        encoder: Encodes images again.
        store: Takes their rows.
    """

    rows: np.ndarray
    stored: StoredRows
    images: np.ndarray
    encoder: "_ImageEncoder"
    store: FeatureStore

    def select(self, indices: Sequence[int]) -> "Features":
        """Return the features of these images alone."""
        chosen = list(indices)
        return replace(self, rows=self.rows[chosen], images=self.images[chosen])

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the features of these images: (B, N, D), float16. N is 1 for pooled ones.

        Raises:
            ImageError: A row is damaged, and its image can't be read any more.
        """
        rows, images = self.rows[list(indices)], self.images[list(indices)]
        if (rows < 0).any():
            raise IndexError("an image that couldn't be read has no features")
        values, damaged = self.stored.read(rows)
        if damaged:
            encoded = self._encode_again({int(rows[i]): int(images[i]) for i in damaged})
            for i in damaged:
                values[i] = encoded[int(rows[i])]
        return torch.from_numpy(values)

    def _encode_again(self, image_by_row: dict[int, int]) -> dict[int, np.ndarray]:
        """Return the features of images whose rows are damaged, by row; mend the rows on disk."""
        log_line(
            f"warning: {self.stored.path}: {len(image_by_row)} rows have changed since they were "
            f"written ({name_some(image_by_row)}); their images are encoded again"
        )
        values: list[np.ndarray] = []
        for _, batch_values, failures in self.encoder.encode(list(image_by_row.values())):
            if failures:
                raise ImageError(f"{failures[0][1]}; its features are damaged")
            values.extend(batch_values)
        encoded = dict(zip(image_by_row, values, strict=True))
        try:
            with self.store.opened_for_append(wait=False):
                for row, image in image_by_row.items():
                    self.store.rewrite(row, self.encoder.key(image), encoded[row])
                    self.stored.set_checksum(row, encoded[row])
        except CacheError:  # read-only, full or being filled: they stay in memory
            self.stored.replaced.update(encoded)
        return encoded


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
        CacheError: The cache is damaged or can't be written, or the disk has too little room.
    """
    regions, width = encoder.grid_shape
    fingerprint = {**encoder.fingerprint(), "precision": str(precision), "pooled": pooled}
    store = FeatureStore(Path(cache_dir), fingerprint, (1 if pooled else regions, width))
    files, failures = _find_files(paths, store)
    image_encoder = _ImageEncoder(encoder, paths, files, device, precision, pooled, workers)
    contents = {file.content for file in files.values()}
    if not contents <= store.row_by_content.keys():
        failures += _fill(store, image_encoder)
    elif _unknown_files(files.values(), store):
        # Worth nothing but the time to hash them again: not worth waiting or failing for.
        with contextlib.suppress(CacheError):
            _fill(store, image_encoder, wait=False)
    report_failures(failures, len(paths), bad_images)
    rows = np.full(len(paths), -1, dtype=np.int64)
    for i, file in files.items():
        rows[i] = store.row_by_content.get(file.content, -1)
    return Features(rows, store.map_rows(), np.arange(len(paths)), image_encoder, store)


def cached_views(
    plain: Features, settings: AugmentationConfig, flippable: Sequence[bool], bad_images: str
) -> list[Features]:
    """Return the features of several views of images: the plain one, then changed ones.

    What an image becomes in a view depends on ``settings.seed``, its content and the number of the
    view. What isn't in the cache is encoded; disk space and time are told beforehand.

    Args:
        plain: The features of the images themselves; all of them, in their order.
        settings: How many views, and what is changed in them.
        flippable: Which images may be flipped.
        bad_images: As for ``cached_features``.

    Raises:
        ImageError: Images can't be read.
        CacheError: The cache is damaged or can't be written, or the disk has too little room.
    """
    views = []
    readable = {i: file for i, file in plain.encoder.files.items() if plain.rows[i] >= 0}
    for number in range(1, settings.views):
        fingerprint = {**plain.store.meta, "augmentation": _decisive(settings, number)}
        store = FeatureStore(plain.store.folder.parent, fingerprint, plain.store.row_shape)
        view = _View(settings, flippable, number)
        views.append((store, replace(plain.encoder, files=readable, view=view)))
    missing = sum(len(_missing(store, encoder)) for store, encoder in views)
    if missing:
        plain.store.check_free_space(missing)
        size = missing * plain.store.row_bytes / 1e9
        log_line(
            f"augmentation.views={settings.views}: features of {missing:,} changed images are to "
            f"be computed: {size:.2g} GB in {plain.store.folder.parent}"
            f"{_expected_time(plain.encoder, missing)}"
        )
    features = [plain]
    for store, encoder in views:
        if _missing(store, encoder):
            report_failures(_fill(store, encoder), len(plain.rows), bad_images)
        rows = np.full(len(plain.rows), -1, dtype=np.int64)
        for i in encoder.files:
            rows[i] = store.row_by_content.get(encoder.key(i), -1)
        features.append(
            replace(plain, rows=rows, stored=store.map_rows(), encoder=encoder, store=store)
        )
    return features


def _decisive(settings: AugmentationConfig, view: int) -> dict[str, float]:
    """Return what decides about the changes in a view."""
    values = asdict(settings)
    del values["views"]
    return {**values, "view": view}


def _missing(store: FeatureStore, encoder: "_ImageEncoder") -> set[str]:
    return {encoder.key(i) for i in encoder.files} - store.row_by_content.keys()


def _expected_time(encoder: "_ImageEncoder", count: int) -> str:
    """Return in words how long encoding will take, measured on a few images."""
    if count < MANY_IMAGES:
        return ""
    images, started = 0, 0.0
    for indices, _, _ in encoder.encode(list(encoder.files)[: TIMED_BATCHES * ENCODE_BATCH_SIZE]):
        if started:  # the first batch begins with preparing the CNN
            images += len(indices)
        else:
            started = time.monotonic()
    if not images:
        return ""
    rate = images / (time.monotonic() - started)
    seconds = count / rate
    duration = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return f", about {duration} ({rate:.0f} images/s)"


def report_failures(failures: Failures, total: int, bad_images: str) -> None:
    """Raise an ImageError for images that can't be read, or report them ("skip")."""
    if not failures:
        return
    messages = [message for _, message in sorted(failures)]
    summary = f"{len(messages)} of {total} images can't be read: {name_some(messages, 3)}"
    if bad_images == "error" or len(messages) == total:
        raise ImageError(f"{summary}; mend them, or set data.bad_images=skip to go without")
    log_line(f"warning: {summary}; they are left out")


def _find_files(
    paths: Sequence[str | Path], store: FeatureStore
) -> tuple[dict[int, _ImageFile], Failures]:
    """Return the image files by their index; only those that the store doesn't know are read."""
    files: dict[int, _ImageFile] = {}
    for i, path in enumerate(paths):
        with contextlib.suppress(OSError, ValueError):  # it is unknown, and named below
            status = FileStatus.of(path)
            content = store.content_by_file.get(status)
            if content in store.row_by_content:
                files[i] = _ImageFile(content, status, settled=True)
    unknown = [i for i in range(len(paths)) if i not in files]
    hashed = _hash_images([paths[i] for i in unknown])
    bar = progress_iter(hashed, "reading image files", len(unknown), "image")
    failures: Failures = []
    for i, file in zip(unknown, bar, strict=True):
        if isinstance(file, _ImageFile):
            files[i] = file
        else:
            failures.append((i, file))
    return files, failures


def _hash_images(paths: Sequence[str | Path]) -> Iterator[_ImageFile | str]:
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for batch in in_batches(len(paths), 1000):
            yield from threads.map(_hash_image, [paths[i] for i in batch])


def _hash_image(path: str | Path) -> _ImageFile | str:
    """Return what identifies an image file, or why it can't be read."""
    try:
        now, status = time.time_ns(), FileStatus.of(path)
        return _ImageFile(hash_file(path), status, now - status.ctime_ns > SETTLED_NS)
    except FileNotFoundError:
        return f"{path}: no such file"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"{path}: can't be read ({getattr(error, 'strerror', None) or error})"


def _unknown_files(files: Iterable[_ImageFile], store: FeatureStore) -> list[_ImageFile]:
    """Return the files whose content has a row, but whose status the store doesn't know."""
    by_status = {
        file.status: file
        for file in files
        if file.settled and file.status not in store.content_by_file
    }
    return [file for file in by_status.values() if file.content in store.row_by_content]


def _fill(store: FeatureStore, encoder: "_ImageEncoder", wait: bool = True) -> Failures:
    """Encode the images that the store lacks; return those that can't be read."""
    files, paths = encoder.files, encoder.paths
    failures: Failures = []
    with store.opened_for_append(wait):
        missing: dict[str, list[int]] = {}
        for i in sorted(files):
            if encoder.key(i) not in store.row_by_content:
                missing.setdefault(encoder.key(i), []).append(i)
        store.check_free_space(len(missing))
        for indices, rows, failed in encoder.encode([group[0] for group in missing.values()]):
            statuses = [
                files[i].status if files[i].settled and not encoder.view else None for i in indices
            ]
            store.append([encoder.key(i) for i in indices], rows, statuses)
            for i, message in failed:
                copies = missing[encoder.key(i)][1:]
                failures += [(i, message)]
                failures += [(copy, f"{paths[copy]}: a copy of {paths[i]}") for copy in copies]
        for file in [] if encoder.view else _unknown_files(files.values(), store):
            store.remember(file.content, file.status)
    return failures


@dataclass(frozen=True)
class _View:
    """A version of each image of a data set; see ``data.augmentation``."""

    settings: AugmentationConfig
    flippable: Sequence[bool]
    number: int


@dataclass(frozen=True)
class _ImageEncoder:
    """The CNN, and the images of a data set that it can encode.

    Attributes:
        files: By index in ``paths``; without those that couldn't be read.
        view: Which version of them; None for the images as they are.
    """

    encoder: Encoder
    paths: Sequence[str | Path]
    files: dict[int, _ImageFile]
    device: torch.device
    precision: torch.dtype
    pooled: bool
    workers: int
    view: _View | None = None

    def key(self, image: int) -> str:
        """Return what the store knows the features of an image by."""
        content = self.files[image].content
        view = self.view
        # The same photograph may have other captions in another data set.
        is_held = view and view.settings.flip and not view.flippable[image]
        return f"{content}-unflipped" if is_held else content

    @property
    def _augment(self) -> Augment | None:
        if not self.view:
            return None
        contents = {i: file.content for i, file in self.files.items()}
        view = self.view
        return partial(of_view, view.settings, view.flippable, contents, view.number)

    def encode(self, indices: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray, Failures]]:
        """Yield batches of these images: their indices, rows (B, N, D) in float16, and failures.

        B may be less than the size of the batch, and 0: images that can't be read have no row.
        """
        if not indices:
            return
        cnn = InferenceEncoder(self.encoder, self.precision)
        ranges = in_batches(len(indices), ENCODE_BATCH_SIZE)
        batches = [[indices[i] for i in batch_range] for batch_range in ranges]
        preprocessing = self.encoder.preprocessing
        loaded = load_pixels(
            self.paths, preprocessing, batches, self.device, self.workers, self._augment
        )
        of_view_number = f", view {self.view.number + 1}" if self.view else ""
        description = f"encoding with {self.encoder.name}{of_view_number}"
        with Progress(description, len(indices), "image") as bar:
            for batch in loaded:
                rows = np.empty((0, 1, 1), dtype=np.float16)
                if batch.indices:
                    grid = cnn(batch.pixels)
                    grid = grid.mean(1, True, dtype=torch.float32) if self.pooled else grid
                    rows = _to_float16(grid)
                # Features of another content than the one that was hashed must not be kept.
                kept = [self._is_unchanged(i) for i in batch.indices]
                indices = [i for i, keep in zip(batch.indices, kept, strict=True) if keep]
                changed = [
                    (i, f"{self.paths[i]}: changed while it was read")
                    for i in set(batch.indices) - set(indices)
                ]
                yield indices, rows[kept], batch.failures + changed
                bar.update(len(batch.indices) + len(batch.failures))

    def _is_unchanged(self, index: int) -> bool:
        """Return whether a file still has the content that was hashed."""
        path, file = self.paths[index], self.files[index]
        with contextlib.suppress(OSError):
            return FileStatus.of(path) == file.status or hash_file(path) == file.content
        return False


def _to_float16(rows: torch.Tensor) -> np.ndarray:
    largest = torch.finfo(torch.float16).max
    return rows.float().clamp(-largest, largest).half().cpu().numpy()
