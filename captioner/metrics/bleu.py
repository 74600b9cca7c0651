"""BLEU-1 to BLEU-4 (Papineni et al., 2002), as the official COCO evaluation prints them.

The counting is nltk's ``corpus_bleu``, taken apart: its building blocks are called once per image
and the counts are kept, so that the corpus, each image and any resample of the images are scored
from the same numbers. On sound input the result is ``corpus_bleu``'s. It differs where nltk
differs from the official tool: nltk counts a hypothesis of fewer than n words as having one
n-gram, the official tool as none; and where an order has no match at all the official tool
continues with ``(0 + 1e-15) / (total + 1e-9)``.
"""

from collections.abc import Sequence

import numpy as np
from nltk.translate.bleu_score import closest_ref_length, modified_precision

from captioner.progress import progress_iter

ORDERS = (1, 2, 3, 4)
NAMES = tuple(f"BLEU-{order}" for order in ORDERS)
_TINY, _SMALL = 1e-15, 1e-9  # the official tool's constants against division by zero


def corpus_bleu(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> dict[str, float]:
    """Return BLEU-1 to BLEU-4 of a corpus, each between 0 and 1.

    Args:
        hypotheses: The words of one caption per image.
        references: The words of one or more captions per image, in the same order.
    """
    totals = bleu_counts(hypotheses, references).sum(axis=0, keepdims=True)
    return dict(zip(NAMES, bleu_of_counts(totals)[0].tolist(), strict=True))


def bleu_counts(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> np.ndarray:
    """Count what BLEU needs, image by image; the counts of a corpus are their sum.

    Returns:
        (B, 10) integers: matching n-grams of orders 1 to 4, n-grams of orders 1 to 4 in the
        hypothesis, length of the hypothesis, closest length of a reference (ties: the shorter).
    """
    counts = np.zeros((len(hypotheses), 2 * len(ORDERS) + 2), dtype=np.int64)
    images = zip(counts, hypotheses, references, strict=True)
    for row, hypothesis, captions in progress_iter(images, "BLEU", len(counts), "image"):
        length = len(hypothesis)
        matches = [modified_precision(captions, hypothesis, order).numerator for order in ORDERS]
        ngrams = [max(0, length - order + 1) for order in ORDERS]
        row[:] = [*matches, *ngrams, length, closest_ref_length(captions, length)]
    return counts


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to BLEU-4, (..., 4), of counts (..., 10) from ``bleu_counts``."""
    matches, ngrams = counts[..., :4], counts[..., 4:8]
    precisions = (matches + _TINY) / (ngrams + _SMALL)
    geometric_means = np.exp(np.cumsum(np.log(precisions), axis=-1) / np.array(ORDERS))
    ratio = (counts[..., 8] + _TINY) / (counts[..., 9] + _SMALL)
    penalty = np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))
    return geometric_means * penalty[..., np.newaxis]
