"""Rewards of self-critical training: CIDEr-D and BLEU-4 of sampled captions, at a high rate.

The numbers are those of ``cider`` and ``bleu``, but what depends on the references alone is
computed once, words are a model's token ids, and all captions of a batch are scored together by a
few NumPy calls: an n-gram is an integer, and the n-grams of the references are sorted tables.

The end token is a word of both sides (Hu et al. 2023, arXiv 2305.12254): without it a caption that
stops in the middle, "a dog with a", costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captioner.data.vocabulary import EOS, PAD
from captioner.errors import DataError
from captioner.metrics.bleu import bleu_of_counts
from captioner.metrics.cider import ORDERS, SIGMA

TokenIds = Sequence[Sequence[int]]


@dataclass(frozen=True)
class _References:
    """The n-grams of one order in the references of all images.

    Attributes:
        ngrams: (G,) each distinct n-gram as an integer, sorted.
        rarity: (G,) its log(images / images with it).
        keys: (E,) ``image * G + number of the n-gram``, sorted; one for each reference with it.
        captions: (E,) which reference, counted over all images.
        counts: (E,) how often it has the n-gram.
        norms: (captions,) length of each reference's tf-idf vector.
    """

    ngrams: np.ndarray
    rarity: np.ndarray
    keys: np.ndarray
    captions: np.ndarray
    counts: np.ndarray
    norms: np.ndarray


class CaptionReward:
    """Scores sampled captions against the references of their images.

    Args:
        references: Token ids of the captions of each image, without BOS and EOS. They are the
            corpus from which CIDEr takes how rare n-grams are.
        vocabulary_size: V; every token id is below it.
        cider_weight: Weight of CIDEr-D, which is 0 to 10.
        bleu_weight: Weight of each caption's own BLEU-4, which is 0 to 1.

    Raises:
        DataError: An image has no reference, or V is so large that n-grams don't fit 64 bits.
    """

    def __init__(
        self,
        references: Sequence[TokenIds],
        vocabulary_size: int,
        cider_weight: float = 1.0,
        bleu_weight: float = 0.0,
    ) -> None:
        if vocabulary_size**ORDERS >= 1 << 63:
            raise DataError(f"rewards need fewer than 55,108 words, found {vocabulary_size}")
        counts = np.array([len(captions) for captions in references], dtype=np.int64)
        if not len(counts) or not counts.all():
            raise DataError("rewards need one reference or more for each image")
        self._vocabulary_size, self._images = vocabulary_size, len(references)
        self._weights = (cider_weight, bleu_weight)
        captions = [[*caption, EOS] for of_image in references for caption in of_image]
        self._image_of = np.repeat(np.arange(len(references)), counts)
        self._references_of = counts
        self._first_reference = np.cumsum(counts) - counts
        self._lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
        padded = np.full((len(captions), int(self._lengths.max())), PAD, dtype=np.int64)
        for row, caption in zip(padded, captions, strict=True):
            row[: len(caption)] = caption
        self._orders = [self._prepare(order, padded) for order in range(1, ORDERS + 1)]

    @property
    def signature(self) -> str:
        """What is rewarded, in a line; two rewards with the same can be compared."""
        cider_weight, bleu_weight = self._weights
        return (
            f"{cider_weight:g} CIDEr-D (1 to {ORDERS}-grams, sigma {SIGMA:g}, times 10, rarity in "
            f"the references of {self._images} images) + {bleu_weight:g} BLEU-{ORDERS}, in the "
            "model's words, its end among them on both sides"
        )

    def _prepare(self, order: int, padded: np.ndarray) -> _References:
        """Count the n-grams of the references, (captions, T)."""
        caption, key, count = _count_ngrams(padded, self._lengths, order, self._vocabulary_size)
        ngrams, ngram = np.unique(key, return_inverse=True)
        image = self._image_of[caption]
        images_with = np.bincount(
            np.unique(image * len(ngrams) + ngram) % max(1, len(ngrams)), minlength=len(ngrams)
        )
        rarity = np.log(self._images) - np.log(np.maximum(1, images_with))
        norms = np.sqrt(np.bincount(caption, (count * rarity[ngram]) ** 2, len(padded)))
        keys = image * len(ngrams) + ngram
        order_of_keys = np.argsort(keys, kind="stable")
        return _References(
            ngrams,
            rarity,
            keys[order_of_keys],
            caption[order_of_keys],
            count[order_of_keys],
            norms,
        )

    def __call__(self, images: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Return the rewards of K captions of each of B images, (B, K).

        Args:
            images: Which images, by their place among the references, (B,).
            token_ids: (B, K, T), without BOS; what comes after the first EOS doesn't count. A
                caption without EOS was cut off, and is scored as it is.
        """
        flat = token_ids.reshape(-1, token_ids.shape[-1])
        image_of = np.repeat(images, token_ids.shape[1])
        ended = flat == EOS
        lengths = np.where(ended.any(1), ended.argmax(1) + 1, flat.shape[1])
        padding = flat == PAD
        lengths = np.minimum(lengths, np.where(padding.any(1), padding.argmax(1), flat.shape[1]))
        rewards = np.zeros(len(flat))
        tables = [
            _count_ngrams(flat, lengths, order, self._vocabulary_size)
            for order in range(1, ORDERS + 1)
        ]
        if self._weights[0]:
            rewards += self._weights[0] * self._cider(image_of, lengths, tables)
        if self._weights[1]:
            rewards += self._weights[1] * self._bleu(image_of, lengths, tables)
        return rewards.reshape(token_ids.shape[:2])

    def _cider(
        self, image_of: np.ndarray, lengths: np.ndarray, tables: Sequence[tuple[np.ndarray, ...]]
    ) -> np.ndarray:
        """Return CIDEr-D of each caption, (captions,): see ``cider.cider``."""
        first, count = self._first_reference[image_of], self._references_of[image_of]
        pair_starts = np.cumsum(count) - count  # a pair: a caption and a reference of its image
        pair_caption = np.repeat(np.arange(len(image_of)), count)
        pair_reference = np.arange(len(pair_caption)) + np.repeat(first - pair_starts, count)
        cosines = np.zeros(len(pair_caption))
        for table, references in zip(tables, self._orders, strict=True):
            caption, ngram, weight, known = self._weigh(table, references)
            norm = np.sqrt(np.bincount(caption, weight**2, len(image_of)))
            entry, match = _matches(references, image_of[caption[known]], ngram[known])
            caption, ngram, weight = (
                caption[known][entry],
                ngram[known][entry],
                weight[known][entry],
            )
            theirs = references.counts[match] * references.rarity[ngram]
            pair = pair_starts[caption] + references.captions[match] - first[caption]
            products = np.bincount(pair, np.minimum(weight, theirs) * theirs, len(cosines))
            scale = norm[pair_caption] * references.norms[pair_reference]
            cosines += np.divide(products, scale, out=np.zeros(len(products)), where=scale > 0)
        difference = lengths[pair_caption] - self._lengths[pair_reference]
        cosines *= np.exp(-(difference**2) / (2 * SIGMA**2))
        return np.bincount(pair_caption, cosines, len(image_of)) / count * 10 / ORDERS

    def _weigh(
        self, table: tuple[np.ndarray, ...], references: _References
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return captions, numbers and tf-idf weights of n-grams, and which the references have."""
        caption, key, count = table
        ngram = np.searchsorted(references.ngrams, key)
        ngram = np.minimum(ngram, len(references.ngrams) - 1)
        known = references.ngrams[ngram] == key
        rarity = np.where(known, references.rarity[ngram], np.log(self._images))
        return caption, ngram, count * rarity, known

    def _bleu(
        self, image_of: np.ndarray, lengths: np.ndarray, tables: Sequence[tuple[np.ndarray, ...]]
    ) -> np.ndarray:
        """Return BLEU-4 of each caption by itself, (captions,): see ``bleu.bleu_counts``."""
        counts = np.zeros((len(image_of), 10), dtype=np.int64)
        for number, (table, references) in enumerate(zip(tables, self._orders, strict=True)):
            caption, ngram, _, known = self._weigh(table, references)
            entry, match = _matches(references, image_of[caption[known]], ngram[known])
            most = np.zeros(int(known.sum()), dtype=np.int64)
            np.maximum.at(most, entry, references.counts[match])
            clipped = np.minimum(most, table[2][known])
            counts[:, number] = np.bincount(caption[known], clipped, len(image_of))
            counts[:, 4 + number] = np.maximum(0, lengths - number)
        counts[:, 8] = lengths
        counts[:, 9] = self._closest_lengths(image_of, lengths)
        return bleu_of_counts(counts)[:, 3]

    def _closest_lengths(self, image_of: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the length of the reference that is nearest in length; of two the shorter."""
        places = np.arange(self._references_of.max())
        there = places < self._references_of[image_of, np.newaxis]
        index = np.minimum(
            self._first_reference[image_of, np.newaxis] + places, len(self._lengths) - 1
        )
        reference = self._lengths[index]
        # The difference decides, then the length itself.
        rank = np.abs(reference - lengths[:, np.newaxis]) * (1 << 32) + reference
        rank[~there] = np.iinfo(np.int64).max
        return np.take_along_axis(reference, rank.argmin(1, keepdims=True), 1)[:, 0]


def _count_ngrams(
    token_ids: np.ndarray, lengths: np.ndarray, order: int, vocabulary_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the n-grams of one order in captions, (captions, T).

    Returns:
        For each distinct n-gram of a caption the caption, the n-gram as an integer, and how often
        it is there, (entries,) each.
    """
    width = token_ids.shape[1] - order + 1
    if width < 1:
        return (np.zeros(0, dtype=np.int64),) * 3
    keys = np.zeros((len(token_ids), width), dtype=np.int64)
    for place in range(order):
        keys = keys * vocabulary_size + token_ids[:, place : place + width]
    beyond = np.arange(width) >= (lengths - order + 1)[:, np.newaxis]
    keys[beyond] = -1
    keys.sort(axis=1)
    is_first = np.ones(keys.shape, dtype=bool)
    is_first[:, 1:] = keys[:, 1:] != keys[:, :-1]
    starts = np.flatnonzero(is_first)
    counts = np.diff(starts, append=keys.size)
    key = keys.ravel()[starts]
    real = key >= 0
    return starts[real] // width, key[real], counts[real]


def _matches(
    references: _References, images: np.ndarray, ngrams: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pair n-grams of images with the references of these images that have them.

    Returns:
        For each pair which of the n-grams it is, and its place in the references' tables.
    """
    wanted = images * len(references.ngrams) + ngrams
    begin = np.searchsorted(references.keys, wanted)
    count = np.searchsorted(references.keys, wanted, "right") - begin
    entry = np.repeat(np.arange(len(wanted)), count)
    return entry, np.arange(len(entry)) + np.repeat(begin - (np.cumsum(count) - count), count)
