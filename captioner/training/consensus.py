"""Fits what an image lets expect of its captions: see ``models.consensus``.

For each training image the target is the mean over its captions of their tf-idf vectors, each of
length 1 in each order of n-grams, as CIDEr has them (Vedantam et al. 2015, eq. 2). Ridge regression
from the CNN's features gives the expectation; of its matrix the best approximation of low rank is
kept (reduced-rank regression, Izenman 1975). All in closed form and float64.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from captioner.data.vocabulary import Vocabulary
from captioner.metrics.cider import DocumentFrequencies
from captioner.models.consensus import Consensus
from captioner.progress import progress_iter
from captioner.search.consensus import ORDERS, Ngrams, count_ngrams

Captions = Sequence[Sequence[str]]  # an image's, in words


def fit_consensus(
    features: np.ndarray,
    captions: Sequence[Captions],
    vocabulary: Vocabulary,
    size: int = 4000,
    rank: int = 64,
    ridge: float = 0.05,
) -> Consensus:
    """Fit the expectation of n-grams to training images.

    Args:
        features: (M, D), of each image the mean over its regions.
        captions: Of each image.
        vocabulary: The captioner's words.
        size: Most n-grams: those of the most images.
        rank: R, at most as many as there are features and n-grams.
        ridge: What is added to the variance of each feature, as a share of their mean variance.
    """
    frequencies = DocumentFrequencies.of(captions)
    kept, unseen = _choose(frequencies, vocabulary, size)
    counts = np.array([frequencies.counts[" ".join(ngram)] for ngram in kept])
    rarity = np.log(frequencies.images / counts)
    places = {ngram: place for place, ngram in enumerate(kept)}
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    product = np.zeros((len(kept), features.shape[1]))
    bias = np.zeros(len(kept))
    rows = list(zip(centred, captions, strict=True))
    for row, of_image in progress_iter(rows, "counting n-grams", len(rows), "image"):
        numbers, values = _target(of_image, places, frequencies)
        product[numbers] += values[:, None] * row
        bias[numbers] += values / len(rows)
    inner, outer = _reduced_rank(centred.T @ centred, product, ridge, rank)
    ids = np.full((len(kept), ORDERS), -1, dtype=np.int32)
    for place, ngram in enumerate(kept):
        ids[place, : len(ngram)] = vocabulary.encode_tokens(ngram)
    parts = (inner, outer, bias - mean @ inner @ outer.T)
    return Consensus.rounded(Ngrams(ids, rarity, unseen), *map(torch.from_numpy, parts))


def _choose(
    frequencies: DocumentFrequencies, vocabulary: Vocabulary, size: int
) -> tuple[list[tuple[str, ...]], float]:
    """Return the n-grams of the most images that captions can hold, and the rarity of others."""
    ngrams = {tuple(text.split(" ")): count for text, count in frequencies.counts.items()}
    words = frozenset(vocabulary.words)
    sayable = [ngram for ngram in ngrams if words.issuperset(ngram)]
    by_count = sorted(sayable, key=lambda ngram: -ngrams[ngram])
    # What is met of the others is met as often as it occurs.
    left = np.array([ngrams[ngram] for ngram in by_count[size:]] or [1], dtype=float)
    return by_count[:size], float(np.average(np.log(frequencies.images / left), weights=left))


def _target(
    captions: Captions, places: Mapping[tuple[str, ...], int], frequencies: DocumentFrequencies
) -> tuple[list[int], np.ndarray]:
    """Return an image's target: the n-grams that aren't 0, and their values."""
    target: Counter[int] = Counter()
    for words in captions:
        for counts in count_ngrams(words):
            weights = {
                ngram: count * math.log(frequencies.images / frequencies.counts[" ".join(ngram)])
                for ngram, count in counts.items()
            }
            length = math.sqrt(sum(weight**2 for weight in weights.values()))
            for ngram, weight in weights.items():
                if weight and ngram in places:
                    target[places[ngram]] += weight / length / len(captions)  # type: ignore
    return list(target), np.array(list(target.values()), dtype=np.float64)


def _reduced_rank(
    gram: np.ndarray, product: np.ndarray, ridge: float, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors (D, R) and (G, R) of the ridge regression's matrix of low rank.

    Args:
        gram: Features times features, (D, D).
        product: Targets times features, (G, D).
        ridge: See ``fit_consensus``.
        rank: R.
    """
    shift = ridge * np.trace(gram) / len(gram) + 1e-12
    matrix = np.linalg.solve(gram + shift * np.eye(len(gram)), product.T)
    values, vectors = np.linalg.eigh(gram)
    predicted = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T @ matrix
    # Its right singular vectors, by the smaller of its two squares.
    squares, left = np.linalg.eigh(predicted @ predicted.T)
    kept = np.flatnonzero(squares >= 1e-12 * squares[-1])[::-1][:rank]
    outer = predicted.T @ (left[:, kept] / np.sqrt(np.maximum(squares[kept], 1e-300)))
    return matrix @ outer, outer
