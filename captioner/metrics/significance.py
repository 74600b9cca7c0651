"""How sure a score is, and whether one result is better than another: by resampling images.

CIDEr's document frequencies stay those of the full set of images while images are resampled.
"""

from collections.abc import Callable, Iterator

import numpy as np

from captioner.metrics.bleu import bleu_of_counts
from captioner.metrics.scores import BLEU_NAMES, Scores

SAMPLES = 1000
SEED = 0
_BLOCK_SIZE = 20_000_000  # numbers in one block of resamples

ScoreOf = Callable[[np.ndarray], np.ndarray]


def resampled_metrics(scores: Scores) -> list[str]:
    """Return the metrics that can be resampled: METEOR's corpus score isn't a mean."""
    return [name for name in scores.corpus if name != "METEOR"]


def confidence_interval(scores: Scores, metric: str, samples: int = SAMPLES) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a corpus score (Efron's percentiles)."""
    statistics, score_of = _statistics(scores, metric)
    values = np.concatenate([score_of(block @ statistics) for block in _resamples(scores, samples)])
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def paired_test(first: Scores, second: Scores, metric: str, samples: int = SAMPLES) -> float:
    """Return how likely a difference this large is if the two results are equally good.

    Approximate randomisation (Noreen, 1989): for each image the two captions are swapped or not
    by a coin, and the share of tosses with at least the observed difference is the p-value. Both
    must be of the same images in the same order.
    """
    first_statistics, score_of = _statistics(first, metric)
    second_statistics, _ = _statistics(second, metric)
    first_sum, second_sum = first_statistics.sum(axis=0), second_statistics.sum(axis=0)
    observed = abs(float(score_of(first_sum) - score_of(second_sum)))
    as_large = 0
    for block in _coins(len(first_statistics), samples):
        swapped = block @ (second_statistics - first_statistics)
        differences = score_of(first_sum + swapped) - score_of(second_sum - swapped)
        as_large += int((np.abs(differences) >= observed - 1e-12).sum())
    return (as_large + 1) / (samples + 1)


def _statistics(scores: Scores, metric: str) -> tuple[np.ndarray, ScoreOf]:
    """Return what to add up over images, (B, K), and what turns sums into a score."""
    if metric in BLEU_NAMES and scores.bleu_counts is not None:
        order = BLEU_NAMES.index(metric)
        return scores.bleu_counts.astype(float), lambda sums: bleu_of_counts(sums)[..., order]
    per_image = scores.per_image[metric]
    images = len(per_image)
    return per_image[:, np.newaxis], lambda sums: sums[..., 0] / images


def _resamples(scores: Scores, samples: int) -> Iterator[np.ndarray]:
    """Yield blocks of (S, B): how often each image is drawn."""
    images = len(next(iter(scores.per_image.values())))
    generator = np.random.default_rng(SEED)
    for count in _blocks(images, samples):
        yield generator.multinomial(images, np.full(images, 1 / images), size=count).astype(float)


def _coins(images: int, samples: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(SEED)
    for count in _blocks(images, samples):
        yield generator.integers(0, 2, size=(count, images)).astype(float)


def _blocks(images: int, samples: int) -> Iterator[int]:
    block_size = max(1, _BLOCK_SIZE // max(1, images))
    for begin in range(0, samples, block_size):
        yield min(block_size, samples - begin)
