"""Image files and their features: which content each file has, and encoding many of them."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from captioner.config import AugmentationConfig
from captioner.data.augmentation import of_view
from captioner.data.images import Augment, in_batches, load_pixels
from captioner.models.encoder import Encoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.progress import Progress
from captioner.training.distributed import Processes
from captioner.training.feature_store import FileStatus, hash_file

ENCODE_BATCH_SIZE = 32
HASHING_THREADS = 8
# File systems note times in steps of up to 2 s: a file that was written just now may be written
# again and look the same. Its hash isn't remembered.
SETTLED_NS = 2_000_000_000

Failures = list[tuple[int, str]]  # images that can't be read: index and message
Encoded = tuple[list[int], np.ndarray, Failures]  # of a batch: indices, rows (B, N, D), failures


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file that was hashed, now or earlier.

    Attributes:
        content: The hash.
        status: What it looked like from outside just before.
        settled: Any later change would show in its status.
    """

    content: str
    status: FileStatus
    settled: bool


def hash_images(paths: Sequence[str | Path]) -> Iterator[ImageFile | str]:
    """Yield what identifies each image file, or why it can't be read."""
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for batch in in_batches(len(paths), 1000):
            yield from threads.map(_hash_image, [paths[i] for i in batch])


def _hash_image(path: str | Path) -> ImageFile | str:
    """Return what identifies an image file, or why it can't be read."""
    try:
        now, status = time.time_ns(), FileStatus.of(path)
        return ImageFile(hash_file(path), status, now - status.ctime_ns > SETTLED_NS)
    except FileNotFoundError:
        return f"{path}: no such file"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"{path}: can't be read ({getattr(error, 'strerror', None) or error})"


@dataclass(frozen=True)
class View:
    """A version of each image of a data set; see ``data.augmentation``."""

    settings: AugmentationConfig
    flippable: Sequence[bool]
    number: int


@dataclass(frozen=True)
class ImageEncoder:
    """The CNN, and the images of a data set that it can encode.

    Attributes:
        files: By index in ``paths``; without those that couldn't be read.
        view: Which version of them; None for the images as they are.
    """

    encoder: Encoder
    paths: Sequence[str | Path]
    files: dict[int, ImageFile]
    device: torch.device
    precision: torch.dtype
    pooled: bool
    workers: int
    view: View | None = None

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

    def encode(self, indices: Sequence[int], total: int = 0) -> Iterator[Encoded]:
        """Yield batches of these images: their indices, rows (B, N, D) in float16, and failures.

        B may be less than the size of the batch, and 0: images that can't be read have no row.

        Args:
            indices: The images.
            total: How many there are in all processes, if that is more.
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
        scale = max(total, len(indices)) / len(indices)
        with Progress(description, max(total, len(indices)), "image") as bar:
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
                bar.update(round(scale * (len(batch.indices) + len(batch.failures))))

    def _is_unchanged(self, index: int) -> bool:
        """Return whether a file still has the content that was hashed."""
        path, file = self.paths[index], self.files[index]
        with contextlib.suppress(OSError):
            return FileStatus.of(path) == file.status or hash_file(path) == file.content
        return False


def _to_float16(rows: torch.Tensor) -> np.ndarray:
    largest = torch.finfo(torch.float16).max
    return rows.float().clamp(-largest, largest).half().cpu().numpy()


def encode_divided(
    encoder: ImageEncoder, indices: Sequence[int], node: Processes
) -> Iterator[list[Encoded]]:
    """Yield what ``ImageEncoder.encode`` gives, some batches at a time, to the first process.

    Each process encodes every N-th batch. The others get an empty list as often.
    """
    batches = in_batches(len(indices), ENCODE_BATCH_SIZE)
    own = [indices[i] for batch in node.share(batches) for i in batch]
    encoded = encoder.encode(own, len(indices))
    for _ in range(-(-len(batches) // node.count)):
        with node.together():
            part = next(encoded, None)
        yield [part for part in node.gather(part) if part]
    with node.together():
        next(encoded, None)  # what it does at its end
