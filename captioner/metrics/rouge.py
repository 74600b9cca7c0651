"""ROUGE-L (Lin, 2004) as the official COCO evaluation computes it."""

from collections.abc import Sequence

import numpy as np

from captioner.progress import progress_iter

BETA = 1.2


def rouge_l(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> np.ndarray:
    """Return the ROUGE-L of each image, (B,); the corpus score is their mean.

    It is the F-measure, with recall weighted ``BETA`` times precision, of the longest common
    subsequence. As in the official tool the largest precision and the largest recall over the
    references are taken separately, and two captions without a word score 1.

    Args:
        hypotheses: The words of one caption per image.
        references: The words of one or more captions per image, in the same order.
    """
    scores = np.zeros(len(hypotheses))
    images = enumerate(zip(hypotheses, references, strict=True))
    for position, (hypothesis, captions) in progress_iter(images, "ROUGE-L", len(scores), "image"):
        hypothesis = hypothesis or [""]
        matches = [longest_common_subsequence(hypothesis, caption or [""]) for caption in captions]
        precision = max(matches) / len(hypothesis)
        recall = max(
            length / max(1, len(caption)) for length, caption in zip(matches, captions, strict=True)
        )
        if precision and recall:
            weighted = (1 + BETA**2) * precision * recall
            scores[position] = weighted / (recall + BETA**2 * precision)
    return scores


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    A whole row of the usual table is one integer, bit j for word j of ``second``: the zeros count
    the matches so far, and one addition moves a row on (Hyyrö, 2004).
    """
    places: dict[str, int] = {}
    for bit, word in enumerate(second):
        places[word] = places.get(word, 0) | 1 << bit
    full = (1 << len(second)) - 1
    row = full
    for word in first:
        matches = row & places.get(word, 0)
        if matches:
            row = (row + matches | row - matches) & full
    return len(second) - row.bit_count()
