"""The features of a frozen CNN, computed once per image and kept on disk.

``feature_store`` has the files; here is what comes before and after them: which image files have
features already, encoding those that don't, and handing features out in batches. Images that are
changed at random have several views, each with a store of its own.
"""

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from captioner.config import AugmentationConfig
from captioner.errors import CacheError, ImageError, name_some
from captioner.models.encoder import Encoder
from captioner.progress import log_line, progress_iter
from captioner.training.distributed import ALONE, Processes
from captioner.training.feature_encoder import (
    ENCODE_BATCH_SIZE,
    Failures,
    ImageEncoder,
    ImageFile,
    View,
    encode_divided,
    hash_images,
)
from captioner.training.feature_store import FeatureStore, FileStatus, StoredRows

# How long more images than these will take is measured beforehand, on so many batches.
MANY_IMAGES, TIMED_BATCHES = 1000, 3


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
    encoder: ImageEncoder
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
    processes: Processes = ALONE,
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
        processes: Those of a machine divide the work: each machine may have its own cache.

    Raises:
        ImageError: Images can't be read; names the first few and how many there are.
        CacheError: The cache is damaged or can't be written, or the disk has too little room.
    """
    regions, width = encoder.grid_shape
    fingerprint = {**encoder.fingerprint(), "precision": str(precision), "pooled": pooled}
    store = FeatureStore(Path(cache_dir), fingerprint, (1 if pooled else regions, width))
    node = processes.node
    files, failures = _find_files(paths, store, node)
    image_encoder = ImageEncoder(encoder, paths, files, device, precision, pooled, workers)
    if any(node.gather_all(len(_missing(store, image_encoder)))):
        failures += _fill(store, image_encoder, node)
    elif node.is_first and _unknown_files(files.values(), store):
        # Worth nothing but the time to hash them again: not worth waiting or failing for.
        with contextlib.suppress(CacheError):
            _fill(store, image_encoder, wait=False)
    report_failures(failures, len(paths), bad_images)
    rows = _rows_of(store, image_encoder)
    return Features(rows, store.map_rows(), np.arange(len(paths)), image_encoder, store)


def _rows_of(store: FeatureStore, encoder: ImageEncoder) -> np.ndarray:
    """Return the row of each image, (images,); -1 where it has none."""
    rows = np.full(len(encoder.paths), -1, dtype=np.int64)
    for i in encoder.files:
        rows[i] = store.row_by_content.get(encoder.key(i), -1)
    return rows


def cached_views(
    plain: Features,
    settings: AugmentationConfig,
    flippable: Sequence[bool],
    bad_images: str,
    processes: Processes = ALONE,
) -> list[Features]:
    """Return the features of several views of images: the plain one, then changed ones.

    What an image becomes in a view depends on ``settings.seed``, its content and the number of the
    view. What isn't in the cache is encoded; disk space and time are told beforehand.

    Args:
        plain: The features of the images themselves; all of them, in their order.
        settings: How many views, and what is changed in them.
        flippable: Which images may be flipped.
        bad_images: As for ``cached_features``.
        processes: As for ``cached_features``.

    Raises:
        ImageError: Images can't be read.
        CacheError: The cache is damaged or can't be written, or the disk has too little room.
    """
    views = []
    readable = {i: file for i, file in plain.encoder.files.items() if plain.rows[i] >= 0}
    for number in range(1, settings.views):
        fingerprint = {**plain.store.meta, "augmentation": _decisive(settings, number)}
        store = FeatureStore(plain.store.folder.parent, fingerprint, plain.store.row_shape)
        view = View(settings, flippable, number)
        views.append((store, replace(plain.encoder, files=readable, view=view)))
    node = processes.node
    missing = [max(node.gather_all(len(_missing(*view)))) for view in views]
    with node.together():
        if node.is_first and any(missing):
            _announce(plain, settings, sum(missing))
    features = [plain]
    for (store, encoder), count in zip(views, missing, strict=True):
        if count:
            report_failures(_fill(store, encoder, node), len(plain.rows), bad_images)
        rows = _rows_of(store, encoder)
        features.append(
            replace(plain, rows=rows, stored=store.map_rows(), encoder=encoder, store=store)
        )
    return features


def _announce(plain: Features, settings: AugmentationConfig, missing: int) -> None:
    """Tell what room and time the features of so many changed images will take.

    Raises:
        CacheError: The disk has too little room.
    """
    plain.store.check_free_space(missing)
    size = missing * plain.store.row_bytes / 1e9
    log_line(
        f"augmentation.views={settings.views}: features of {missing:,} changed images are to "
        f"be computed: {size:.2g} GB in {plain.store.folder.parent}"
        f"{_expected_time(plain.encoder, missing)}"
    )


def _decisive(settings: AugmentationConfig, view: int) -> dict[str, float]:
    """Return what decides about the changes in a view."""
    values = asdict(settings)
    del values["views"]
    return {**values, "view": view}


def _missing(store: FeatureStore, encoder: ImageEncoder) -> set[str]:
    return {encoder.key(i) for i in encoder.files} - store.row_by_content.keys()


def _expected_time(encoder: ImageEncoder, count: int) -> str:
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
    paths: Sequence[str | Path], store: FeatureStore, node: Processes
) -> tuple[dict[int, ImageFile], Failures]:
    """Return the image files by their index; only those that the store doesn't know are read."""
    files: dict[int, ImageFile] = {}
    failures: Failures = []
    part = node.share(range(len(paths)))
    with node.together():
        for i in part:
            with contextlib.suppress(OSError, ValueError):  # it is unknown, and named below
                status = FileStatus.of(paths[i])
                content = store.content_by_file.get(status)
                if content in store.row_by_content:
                    files[i] = ImageFile(content, status, settled=True)
        unknown = [i for i in part if i not in files]
        hashed = hash_images([paths[i] for i in unknown])
        bar = progress_iter(hashed, "reading image files", len(unknown), "image")
        for i, file in zip(unknown, bar, strict=True):
            if isinstance(file, ImageFile):
                files[i] = file
            else:
                failures.append((i, file))
    parts = node.gather_all((files, failures))
    return {i: file for files, _ in parts for i, file in files.items()}, [
        failure for _, failures in parts for failure in failures
    ]


def _unknown_files(files: Iterable[ImageFile], store: FeatureStore) -> list[ImageFile]:
    """Return the files whose content has a row, but whose status the store doesn't know."""
    by_status = {
        file.status: file
        for file in files
        if file.settled and file.status not in store.content_by_file
    }
    return [file for file in by_status.values() if file.content in store.row_by_content]


def _fill(
    store: FeatureStore, encoder: ImageEncoder, node: Processes = ALONE, wait: bool = True
) -> Failures:
    """Encode the images that the store lacks; return those that can't be read.

    The first process of a machine has the store open; the others send it the rows of their batches.
    """
    files = encoder.files
    failures: Failures = []
    with contextlib.ExitStack() as opened:
        missing: dict[str, list[int]] = {}
        with node.together():
            if node.is_first:
                opened.enter_context(store.opened_for_append(wait))
                for i in sorted(files):
                    if encoder.key(i) not in store.row_by_content:
                        missing.setdefault(encoder.key(i), []).append(i)
                store.check_free_space(len(missing))
        missing = node.first_says(missing)
        for parts in encode_divided(encoder, [group[0] for group in missing.values()], node):
            with node.together():
                for part in parts:
                    failures += _append(store, encoder, missing, *part)
        with node.together():
            if node.is_first:
                for file in [] if encoder.view else _unknown_files(files.values(), store):
                    store.remember(file.content, file.status)
                opened.close()
    if node.count > 1:
        failures = node.first_says(failures)
        with node.together():
            store.reload()
    return failures


def _append(
    store: FeatureStore,
    encoder: ImageEncoder,
    missing: dict[str, list[int]],
    indices: list[int],
    rows: np.ndarray,
    failed: Failures,
) -> Failures:
    """Write the rows of a batch of images; return which couldn't be read, copies among them."""
    files, paths = encoder.files, encoder.paths
    statuses = [files[i].status if files[i].settled and not encoder.view else None for i in indices]
    store.append([encoder.key(i) for i in indices], rows, statuses)
    failures: Failures = []
    for i, message in failed:
        copies = missing[encoder.key(i)][1:]
        failures += [(i, message)]
        failures += [(copy, f"{paths[copy]}: a copy of {paths[i]}") for copy in copies]
    return failures
