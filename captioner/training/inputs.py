"""What a model is trained on: cached features of a frozen CNN, or pixels."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from captioner.config import AugmentationConfig, Config
from captioner.data.augmentation import of_epoch, tells_sides, views_of_epoch
from captioner.data.dataset import Batch, CaptionDataset
from captioner.data.images import in_batches, load_pixels
from captioner.data.preprocessing import Preprocessing, count_cores
from captioner.device import free_memory
from captioner.models.captioning_model import CaptioningModel
from captioner.progress import Progress, log_line
from captioner.training.distributed import ALONE, Processes
from captioner.training.feature_cache import (
    Features,
    cached_features,
    cached_views,
    report_failures,
)
from captioner.training.feature_store import default_cache_dir

CPU = torch.device("cpu")
NO_AUGMENTATION = AugmentationConfig()
T = TypeVar("T")
MOST_BYTES_KEPT = 2 << 30  # of pixels that are the same in each epoch


@dataclass(frozen=True)
class TrainingBatch:
    """Some images and their captions, as an optimiser step takes them.

    Attributes:
        images: Which images of the training set these are, B of them.
        x: Their cached features (B, N, D), or pixels (B, 3, S, S).
        token_ids: Captions from BOS to EOS, then PAD, (B, K, T + 1).
    """

    images: Sequence[int]
    x: Tensor
    token_ids: Tensor


@dataclass(frozen=True)
class CachedInputs:
    """Batches of cached features, (B, N, D), float16.

    Attributes:
        views: The features of the images themselves, then of changed versions if there are any.
        seed: Decides which view of an image an epoch takes.
        device: What computes with them. For a GPU batches are loaded ahead, into pinned memory.
        kept: All of them on the device, (V, images, N, D), where they fit.
    """

    views: list[Features]
    seed: int
    device: torch.device = CPU
    kept: Tensor | None = None

    def batches(
        self, batches: Sequence[Sequence[int]], epoch: int = 0
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the images of each batch and their features."""
        count = len(self.views[0].rows)
        view_by_image = views_of_epoch(self.seed, epoch, count, len(self.views))
        taken = (
            (list(indices), self._take(np.array(indices, int), view_by_image[list(indices)]))
            for indices in batches
        )
        if self.device.type != "cuda" or self.kept is not None:
            yield from taken
        else:
            yield from loaded_ahead((indices, x.pin_memory()) for indices, x in taken)

    def on_device(self) -> "CachedInputs":
        """Return the same with all features on the device, if they take up to half of what is free.

        They are read from the disk once then, in place of once an epoch.
        """
        count, shape = len(self.views[0].rows), self.views[0].stored.shape[1:]
        size = 2 * len(self.views) * count * math.prod(shape)
        if size > free_memory(self.device) // 2:
            return self
        kept = torch.empty(
            (len(self.views), count, *shape), dtype=torch.float16, device=self.device
        )
        with Progress("features to the device", len(self.views) * count, "image") as bar:
            for view, of_view in zip(self.views, kept, strict=True):
                for images in in_batches(count, 256):
                    of_view[images.start : images.stop] = view.take(images)
                    bar.update(len(images))
        return replace(self, kept=kept)

    def _take(self, images: np.ndarray, chosen: np.ndarray) -> Tensor:
        """Return the features of images (B), each in the view that is chosen for it (B)."""
        if not len(images):
            return torch.empty(0)
        if self.kept is not None:
            rows = torch.from_numpy(chosen * self.kept.shape[1] + images)
            return self.kept.flatten(0, 1)[rows.to(self.device, non_blocking=True)]
        numbers = np.unique(chosen).tolist()
        if len(numbers) == 1:
            return self.views[numbers[0]].take(images)
        places = [np.flatnonzero(chosen == number) for number in numbers]
        parts = [
            self.views[number].take(images[at]) for number, at in zip(numbers, places, strict=True)
        ]
        return torch.cat(parts)[np.argsort(np.concatenate(places))]


@dataclass(frozen=True)
class PixelInputs:
    """Batches of pixels, (B, 3, S, S), uint8, for a CNN that is being trained.

    Attributes:
        augmentation: How images are changed; an epoch's changes depend on (seed, epoch, image).
        flippable: Which images may be flipped.
        seed: Of these changes.
        kept: Pixels of all images, where they are the same in each epoch and fit into memory.
    """

    paths: list[Path]
    preprocessing: Preprocessing
    workers: int
    device: torch.device
    augmentation: AugmentationConfig
    flippable: list[bool]
    seed: int
    kept: Tensor | None = None

    def batches(
        self, batches: Sequence[Sequence[int]], epoch: int = 0
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the images of each batch that can be read, and their pixels."""
        if self.kept is not None:
            yield from ((list(indices), self.kept[list(indices)]) for indices in batches)
            return
        settings = self.augmentation
        augment = partial(of_epoch, settings, self.flippable, self.seed, epoch)
        loader = load_pixels(
            self.paths,
            self.preprocessing,
            batches,
            self.device,
            self.workers,
            augment if settings.changes else None,
        )
        for batch in loader:
            # They could be read before training: a disk that fails now must not end the job.
            for _, message in batch.failures:
                log_line(f"warning: {message}; left out of this batch", urgent=True)
            yield batch.indices, batch.pixels


Inputs = CachedInputs | PixelInputs


def loaded_ahead(items: Iterator[T], count: int = 3) -> Iterator[T]:
    """Yield items that a thread of their own takes, up to ``count`` of them ahead."""
    thread = ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, items, None) for _ in range(count))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def training_groups(
    batches: Sequence[Batch],
    inputs: Inputs,
    epoch: int,
    accumulation_steps: int,
    processes: Processes,
) -> Iterator[list[TrainingBatch]]:
    """Yield this process's part of the batches of each optimiser step; it may have none.

    Args:
        batches: Of all processes.
        inputs: What the images are.
        epoch: Decides how images are changed.
        accumulation_steps: Batches that make a step.
        processes: Each takes every N-th image of a batch, so that all have about as much to do:
            the images of a batch are sorted by the length of their captions.
    """
    parts = [batch.share(processes.rank, processes.count) for batch in batches]
    loaded = inputs.batches([part.images for part in parts], epoch)
    group: list[TrainingBatch] = []
    for number, (part, (images, x)) in enumerate(zip(parts, loaded, strict=True), 1):
        if images:
            group.append(TrainingBatch(images, x, _token_ids_of(part, images)))
        if number % accumulation_steps == 0 or number == len(parts):
            yield group
            group = []


def _token_ids_of(batch: Batch, images: Sequence[int]) -> Tensor:
    """Return the token ids of those of a batch's images that could be read."""
    if list(images) == batch.images:
        return batch.token_ids
    readable = set(images)
    return batch.token_ids[[image in readable for image in batch.images]]


def prepare_inputs(
    model: CaptioningModel,
    dataset: CaptionDataset,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
    training: bool = False,
    processes: Processes = ALONE,
) -> tuple[CaptionDataset, Inputs]:
    """Encode all images once if the CNN is frozen, else check that they can all be read.

    Args:
        model: Whose CNN encodes them.
        dataset: The images.
        config: The experiment.
        device: Where the CNN computes.
        precision: Of a frozen CNN.
        training: Whether the images are to be changed as ``config.augmentation`` says.
        processes: They divide the work, and get the same.

    Returns:
        The images that can be read, and their inputs.

    Raises:
        ImageError: Some can't, and ``data.bad_images`` is "error".
    """
    if config.data.workers < 0 and processes.node.count > 1:  # the machine's cores are shared
        workers = max(1, min(16, count_cores() // processes.node.count))
        config = replace(config, data=replace(config.data, workers=workers))
    settings = config.augmentation if training else NO_AUGMENTATION
    flippable = [not (settings.flip and tells_sides(texts)) for texts in dataset.captions]
    _report_augmentation(settings, flippable, model.encoder.frozen)
    if model.encoder.frozen:
        return _cached_inputs(
            model, dataset, config, device, precision, settings, flippable, processes
        )
    return _pixel_inputs(
        model.encoder.preprocessing, dataset, config, device, settings, flippable, processes
    )


def _pixel_inputs(
    preprocessing: Preprocessing,
    dataset: CaptionDataset,
    config: Config,
    device: torch.device,
    settings: AugmentationConfig,
    flippable: list[bool],
    processes: Processes,
) -> tuple[CaptionDataset, PixelInputs]:
    """Return the images that can be read, and their pixels."""
    data = config.data
    failures = []
    alone = processes.count == 1  # else no process reads all of them, nor needs the same each time
    size = preprocessing.image_size
    kept = _empty_pixels(len(dataset), size) if alone and not settings.changes else None
    count = 0
    batches = processes.share(in_batches(len(dataset), 32))
    with (
        processes.together(),
        Progress("reading images", sum(map(len, batches)), "image") as bar,
    ):
        for batch in load_pixels(dataset.paths, preprocessing, batches, device, data.workers):
            failures += batch.failures
            if kept is not None and batch.indices:
                kept[count : count + len(batch.indices)] = batch.pixels
            count += len(batch.indices)
            bar.update(len(batch.indices) + len(batch.failures))
    failures = [failure for part in processes.gather_all(failures) for failure in part]
    report_failures(failures, len(dataset), data.bad_images)
    unreadable = {index for index, _ in failures}
    readable = [i for i in range(len(dataset)) if i not in unreadable]
    dataset = dataset.select(readable)
    return dataset, PixelInputs(
        dataset.paths,
        preprocessing,
        data.workers,
        device,
        settings,
        [flippable[i] for i in readable],
        config.training.seed,
        None if kept is None else kept[:count],
    )


def _empty_pixels(count: int, image_size: int) -> Tensor | None:
    """Return room for the pixels of so many images, or None where they would take too much."""
    size = 3 * image_size**2 * count
    if size > min(MOST_BYTES_KEPT, free_memory(CPU) // 4):
        return None
    return torch.empty((count, 3, image_size, image_size), dtype=torch.uint8)


def _cached_inputs(
    model: CaptioningModel,
    dataset: CaptionDataset,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
    settings: AugmentationConfig,
    flippable: list[bool],
    processes: Processes,
) -> tuple[CaptionDataset, CachedInputs]:
    """Return the images that can be read, and the features of each of their views."""
    data = config.data
    plain = cached_features(
        model.encoder,
        dataset.paths,
        data.cache_dir or default_cache_dir(),
        device,
        precision,
        model.decoder.pooled,
        data.workers,
        data.bad_images,
        processes,
    )
    views = cached_views(plain, settings, flippable, data.bad_images, processes)
    rows = np.stack([view.rows for view in views])
    readable = np.flatnonzero((rows >= 0).all(0)).tolist()
    chosen = [view.select(readable) for view in views]
    inputs = CachedInputs(chosen, config.training.seed, device)
    return dataset.select(readable), inputs.on_device() if device.type == "cuda" else inputs


def _report_augmentation(settings: AugmentationConfig, flippable: list[bool], frozen: bool) -> None:
    """Say what the settings of the augmentation don't do."""
    if frozen and settings.changes and settings.views == 1:
        log_line(
            "warning: augmentation.crop, flip and colour have no effect on a frozen CNN with "
            "augmentation.views=1; views=4 caches three changed versions of each image too"
        )
    elif settings.flip:
        log_line(
            f"augmentation.flip: {flippable.count(False):,} of {len(flippable):,} images are never "
            "flipped, since a caption says left or right"
        )
    if not frozen and settings.views > 1:
        log_line(
            f"warning: augmentation.views={settings.views} has no effect on a CNN that is trained: "
            "each epoch changes the images anew"
        )
