"""What a model is trained on: cached features of a frozen CNN, or pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from captioner.config import Config
from captioner.data.dataset import CaptionDataset
from captioner.data.images import Preprocessing, in_batches, load_pixels
from captioner.models.captioning_model import CaptioningModel
from captioner.progress import Progress, log_line
from captioner.training.feature_cache import Features, cached_features, report_failures
from captioner.training.feature_store import default_cache_dir


@dataclass(frozen=True)
class CachedInputs:
    """Batches of cached features, (B, N, D), float16."""

    features: Features

    def batches(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the images of each batch and their features."""
        for indices in batches:
            yield list(indices), self.features.take(indices)


@dataclass(frozen=True)
class PixelInputs:
    """Batches of pixels, (B, 3, S, S), uint8, for a CNN that is being trained."""

    paths: list[Path]
    preprocessing: Preprocessing
    workers: int
    device: torch.device

    def batches(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the images of each batch that can be read, and their pixels."""
        loader = load_pixels(self.paths, self.preprocessing, batches, self.device, self.workers)
        for batch in loader:
            # They could be read before training: a disk that fails now must not end the job.
            for _, message in batch.failures:
                log_line(f"warning: {message}; left out of this batch")
            yield batch.indices, batch.pixels


Inputs = CachedInputs | PixelInputs


def prepare_inputs(
    model: CaptioningModel,
    dataset: CaptionDataset,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
) -> tuple[CaptionDataset, Inputs]:
    """Encode all images once if the CNN is frozen, else check that they can all be read.

    Returns:
        The images that can be read, and their inputs.

    Raises:
        ImageError: Some can't, and ``data.bad_images`` is "error".
    """
    data = config.data
    if model.encoder.frozen:
        features = cached_features(
            model.encoder,
            dataset.paths,
            data.cache_dir or default_cache_dir(),
            device,
            precision,
            model.decoder.pooled,
            data.workers,
            data.bad_images,
        )
        readable = [i for i, row in enumerate(features.rows) if row >= 0]
        inputs: Inputs = CachedInputs(features.select(readable))
        return dataset.select(readable), inputs
    preprocessing = model.encoder.preprocessing
    batches = in_batches(len(dataset), 32)
    failures = []
    with Progress("checking images", len(dataset), "image") as bar:
        for batch in load_pixels(dataset.paths, preprocessing, batches, device, data.workers):
            failures += batch.failures
            bar.update(len(batch.indices) + len(batch.failures))
    report_failures(failures, len(dataset), data.bad_images)
    unreadable = {index for index, _ in failures}
    dataset = dataset.select([i for i in range(len(dataset)) if i not in unreadable])
    return dataset, PixelInputs(dataset.paths, preprocessing, data.workers, device)
