"""Validation: images are captioned freely, and the captions scored."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from captioner.data.annotations import ImageId
from captioner.data.dataset import CaptionDataset
from captioner.data.images import in_batches
from captioner.data.tokenizer import tokenize
from captioner.metrics.diversity import describe
from captioner.metrics.scores import compute_metrics
from captioner.models.captioning_model import CaptioningModel, generate
from captioner.models.inference_decoder import InferenceDecoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.progress import Progress
from captioner.stopping import StopSignals
from captioner.training.distributed import Processes
from captioner.training.inputs import Inputs

VALIDATION_METRICS = ("BLEU", "ROUGE-L", "CIDEr-D")
# What shows that a better score is none: see ``diversity.describe``.
STATISTICS = (
    *("vocabulary", "unique_captions", "length_mean", "ends_in_function_word", "repeats_ngram"),
)


@dataclass(frozen=True)
class Validation:
    """What a validation gave.

    Attributes:
        scores: Of the freely decoded captions, each metric's.
        statistics: What these captions are like: see ``STATISTICS``.
        captions: By image id.
        seconds: How long it took.
    """

    scores: dict[str, float]
    statistics: dict[str, float]
    captions: dict[ImageId, str]
    seconds: float

    @classmethod
    def of(
        cls, captions: Mapping[ImageId, str], dataset: CaptionDataset, started: float
    ) -> "Validation":
        """Score captions.

        Args:
            captions: Of all images.
            dataset: The images.
            started: When validation began (``time.monotonic``).
        """
        captions = {image_id: captions[image_id] for image_id in dataset.image_ids}
        scores = compute_metrics(captions, dataset.references, VALIDATION_METRICS)
        statistics = describe([tokenize(caption) for caption in captions.values()])
        chosen = {name: statistics[name] for name in STATISTICS}
        return cls(scores, chosen, captions, time.monotonic() - started)

    def values(self, prefix: str = "") -> dict[str, float]:
        """Return all numbers, for the log."""
        numbers = {"validation_seconds": self.seconds, **self.scores, **self.statistics}
        return {f"{prefix}{name}": value for name, value in numbers.items()}


def caption_images(
    model: CaptioningModel,
    dataset: CaptionDataset,
    inputs: Inputs,
    batch_size: int,
    precision: torch.dtype,
    processes: Processes,
    stop_signals: StopSignals,
) -> dict[ImageId, str]:
    """Caption this process's part of the images by free-running search.

    Args:
        model: What captions them.
        dataset: The images.
        inputs: Their features or pixels.
        batch_size: Images decoded at a time.
        precision: torch.bfloat16 or torch.float32, for matrix products.
        processes: Each takes every N-th image.
        stop_signals: What ends it early.

    Returns:
        The captions by image id; an image that can't be read any more gets "".

    Raises:
        Stopped: A signal has come.
    """
    part = processes.share(range(len(dataset)))
    batches = [[part[i] for i in batch] for batch in in_batches(len(part), batch_size)]
    captions: dict[ImageId, str] = {dataset.image_ids[i]: "" for i in part}
    decoder = InferenceDecoder(model.decoder, precision)
    cnn = None if model.encoder.frozen else InferenceEncoder(model.encoder, precision)
    with Progress("validation", len(part), "image") as bar:
        for indices, x in inputs.batches(batches):
            if indices:
                features = cnn(x) if cnn else model.features(x, precision)
                hypotheses = generate([decoder], [features], model.search, model.vocabulary)
                best = model.best_captions(hypotheses)
                captions |= zip((dataset.image_ids[i] for i in indices), best, strict=True)
            bar.update(len(indices))
            stop_signals.raise_if_received()
    return captions
