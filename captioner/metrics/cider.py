"""CIDEr and CIDEr-D (Vedantam, Zitnick and Parikh, 2015).

Both compare n-grams of orders 1 to 4, each weighted by how rare it is among the images (tf-idf),
by their cosine, averaged over the orders and over the references, times 10. CIDEr-D, which the
official tool prints as "CIDEr", clips the hypothesis's weights to the reference's and multiplies
by a Gaussian of the difference in length, which it counts in bigrams.

All captions are counted at once: an n-gram is an integer, a caption's n-grams are a stretch of
one long sorted array, and each step below is one NumPy call over all of them.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioner.errors import DataError
from captioner.files import read_json, write_json

ORDERS = 4
SIGMA = 6.0

Captions = Sequence[Sequence[str]]


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images of a corpus each n-gram occurs.

    Attributes:
        images: The number of images in the corpus.
        counts: For each n-gram, its words joined by spaces, the images with it in a reference.
    """

    images: int
    counts: Mapping[str, int]

    @classmethod
    def of(cls, references: Sequence[Captions]) -> "DocumentFrequencies":
        """Count the n-grams in the references of each image."""
        captions = [caption for captions in references for caption in captions]
        image_of = np.repeat(np.arange(len(references)), [len(image) for image in references])
        counts: dict[str, int] = {}
        for table in _count_ngrams(captions):
            counts |= zip(table.texts(), table.images_with(image_of).tolist(), strict=True)
        return cls(len(references), counts)

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, {"images": self.images, "counts": dict(self.counts)}, indent=None)

    @classmethod
    def load(cls, path: str | Path) -> "DocumentFrequencies":
        """Read what ``save`` wrote.

        Raises:
            DataError: The file is missing or isn't such a file.
        """
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("counts"), dict):
            raise DataError(f"{path}: not a file of document frequencies ('images' and 'counts')")
        images, counts = content.get("images"), content["counts"]
        if type(images) is not int or images < 1:
            raise DataError(f"{path}: 'images' must be a positive integer, found {images!r}")
        for ngram, count in counts.items():
            if type(count) is not int or not 0 <= count <= images:
                raise DataError(
                    f"{path}: the count of '{ngram}' must be an integer from 0 to 'images', "
                    f"{images}, found {count!r}"
                )
        return cls(images, counts)

    def digest(self) -> str:
        """Return 12 hexadecimal digits that tell other document frequencies from these."""
        ngrams = sorted(self.counts)
        digest = hashlib.sha256("\n".join(ngrams).encode("utf-8", "backslashreplace"))
        digest.update(repr((self.images, [self.counts[ngram] for ngram in ngrams])).encode())
        return digest.hexdigest()[:12]


def cider(
    hypotheses: Captions,
    references: Sequence[Captions],
    frequencies: DocumentFrequencies | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the CIDEr-D and the CIDEr of each image, (B,) each; a corpus score is their mean.

    Args:
        hypotheses: The words of one caption per image.
        references: The words of one or more captions per image, in the same order.
        frequencies: How rare n-grams are, from a training corpus. Without them the references at
            hand are the corpus, as in the official tool: then one image alone scores 0.
    """
    images = len(hypotheses)
    counts = np.array([len(captions) for captions in references], dtype=np.int64)
    image_of = np.concatenate([np.arange(images), np.repeat(np.arange(images), counts)])
    captions = [*hypotheses, *(caption for captions in references for caption in captions)]
    log_images = math.log(frequencies.images if frequencies else max(1, images))
    sums = np.zeros((2, len(captions)))
    penalty = _length_penalty(captions, image_of)
    for table in _count_ngrams(captions):
        if frequencies:
            known_counts = frequencies.counts
            images_with = np.array([known_counts.get(text, 0) for text in table.texts()], float)
        else:
            images_with = table.images_with(image_of, first_caption=images)
        rarity = log_images - np.log(np.maximum(1.0, images_with))
        clipped, plain = _cosines(table, table.count * rarity[table.ngram], image_of, images)
        sums += [clipped * penalty, plain]
    # The mean over the orders and over each image's references.
    clipped, plain = (
        np.bincount(image_of[images:], caption_scores[images:], images)
        / np.maximum(1, counts)
        * 10
        / ORDERS
        for caption_scores in sums
    )
    return clipped, plain


@dataclass(frozen=True)
class _NgramTable:
    """How often each n-gram of one order occurs in each caption, sorted by caption and n-gram.

    Attributes:
        caption: (E,) which caption.
        ngram: (E,) which n-gram, 0 to G - 1.
        count: (E,) how often.
        distinct: G.
        places: (G,) where in ``words`` each n-gram stands.
    """

    caption: np.ndarray
    ngram: np.ndarray
    count: np.ndarray
    distinct: int
    places: np.ndarray
    words: Sequence[str]
    order: int

    def texts(self) -> list[str]:
        """Return each n-gram's words, joined by spaces."""
        return [" ".join(self.words[place : place + self.order]) for place in self.places.tolist()]

    def images_with(self, image_of: np.ndarray, first_caption: int = 0) -> np.ndarray:
        """Count for each n-gram the images with it in a caption from ``first_caption`` on, (G,)."""
        begin = np.searchsorted(self.caption, first_caption)
        keys = np.sort(image_of[self.caption[begin:]] * self.distinct + self.ngram[begin:])
        keys = keys[np.flatnonzero(np.diff(keys, prepend=-1))]  # np.unique's hashing is far slower
        return np.bincount(keys % max(1, self.distinct), minlength=self.distinct)


def _count_ngrams(captions: Captions) -> Iterator[_NgramTable]:
    """Yield a table for each order from 1 to 4."""
    words = [word for caption in captions for word in caption]
    numbers: dict[str, int] = {}
    unigrams = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)
    caption_of = np.repeat(np.arange(len(captions)), [len(caption) for caption in captions])
    ngrams = np.zeros(len(words), dtype=np.int64)  # the n-gram that starts at each word
    for order in range(1, ORDERS + 1):
        # A longer n-gram is a shorter one and a word, if both are of the same caption.
        last = unigrams[order - 1 :]
        in_one_caption = caption_of[: len(last)] == caption_of[order - 1 :]
        starts = np.flatnonzero(in_one_caption)
        keys = ngrams[: len(last)] * len(numbers) + last
        distinct, first, numbered = np.unique(keys[starts], return_index=True, return_inverse=True)
        entries, count = np.unique(
            caption_of[starts] * max(1, len(distinct)) + numbered, return_counts=True
        )
        caption, ngram = np.divmod(entries, max(1, len(distinct)))
        yield _NgramTable(caption, ngram, count, len(distinct), starts[first], words, order)
        ngrams = np.zeros(len(last), dtype=np.int64)
        ngrams[starts] = numbered


def _length_penalty(captions: Captions, image_of: np.ndarray) -> np.ndarray:
    """Return each caption's Gaussian of the difference to its image's hypothesis, in bigrams."""
    bigrams = np.array([max(0, len(caption) - 1) for caption in captions], dtype=float)
    return np.exp(-((bigrams[image_of] - bigrams) ** 2) / (2 * SIGMA**2))


def _cosines(
    table: _NgramTable, weight: np.ndarray, image_of: np.ndarray, images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each caption's clipped and plain cosine with the hypothesis of its image.

    The first ``images`` captions are the hypotheses. Captions without weight score 0.
    """
    captions = len(image_of)
    norm = np.sqrt(np.bincount(table.caption, weight**2, captions))
    keys = table.caption * table.distinct + table.ngram
    # The key of each caption's n-gram in its image's hypothesis, and where it stands, if anywhere.
    hypothesis_keys = image_of[table.caption] * table.distinct + table.ngram
    place = np.minimum(np.searchsorted(keys, hypothesis_keys), max(0, len(keys) - 1))
    shared = keys[place] == hypothesis_keys if len(keys) else np.zeros(0, dtype=bool)
    reference, hypothesis = weight[shared], weight[place[shared]]
    scale = norm * norm[image_of]
    scale[scale == 0] = np.inf
    caption = table.caption[shared]
    clipped = np.bincount(caption, np.minimum(reference, hypothesis) * reference, captions)
    plain = np.bincount(caption, reference * hypothesis, captions)
    return clipped / scale, plain / scale
