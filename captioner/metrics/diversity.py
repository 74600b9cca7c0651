"""What captions are like, whatever they are scored: how varied, how long, how well formed."""

from collections.abc import Iterable, Sequence

import numpy as np

from captioner.data.vocabulary import FUNCTION_WORDS
from captioner.metrics.bleu import bleu_counts, bleu_of_counts

Captions = Sequence[Sequence[str]]


def describe(
    captions: Captions, training: Iterable[Sequence[str]] | None = None
) -> dict[str, float]:
    """Return statistics of tokenised captions.

    Args:
        captions: The words of each caption.
        training: The words of the training captions, for the share of captions not among them.

    Returns:
        ``distinct-1`` and ``distinct-2``: different n-grams for each n-gram (Li et al., 2016);
        ``vocabulary``: different words; ``unique_captions``: share of different captions;
        ``length_mean``, ``length_std``, ``length_min``, ``length_max`` in words; ``empty``,
        ``ends_in_function_word`` and ``repeats_ngram``: shares of captions, the last of those in
        which some one to four words follow themselves, or three words come twice;
        ``novel``: share not among the training captions.
    """
    lengths = np.array([len(caption) for caption in captions])
    distinct_captions = {tuple(caption) for caption in captions}
    statistics = {
        "distinct-1": _distinct(captions, 1),
        "distinct-2": _distinct(captions, 2),
        "vocabulary": len({word for caption in captions for word in caption}),
        "unique_captions": len(distinct_captions) / len(captions),
        "length_mean": float(lengths.mean()),
        "length_std": float(lengths.std()),
        "length_min": int(lengths.min()),
        "length_max": int(lengths.max()),
        "empty": float((lengths == 0).mean()),
        "ends_in_function_word": _share(
            bool(caption) and caption[-1] in FUNCTION_WORDS for caption in captions
        ),
        "repeats_ngram": _share(map(repeats_ngram, captions)),
    }
    if training is not None:
        training_captions = {tuple(caption) for caption in training}
        statistics["novel"] = _share(
            tuple(caption) not in training_captions for caption in captions
        )
    return statistics


def repeats_ngram(caption: Sequence[str]) -> bool:
    """Tell whether one to four words follow themselves, or three words come twice."""
    words = list(caption)
    for order in range(1, 5):
        for start in range(len(words) - 2 * order + 1):
            if words[start : start + order] == words[start + order : start + 2 * order]:
                return True
    trigrams = _ngrams(words, 3)
    return len(set(trigrams)) < len(trigrams)


def self_bleu(candidates: Sequence[Captions]) -> float:
    """Return the mean BLEU-4 of each caption against the other captions of its image.

    Low is varied (Zhu et al., 2018). Images with fewer than two captions are left out.

    Args:
        candidates: The words of the n best captions of each image.
    """
    pairs = [
        (captions[place], [*captions[:place], *captions[place + 1 :]])
        for captions in map(list, candidates)
        for place in range(len(captions))
        if len(captions) > 1
    ]
    if not pairs:
        return float("nan")
    hypotheses, references = zip(*pairs, strict=True)
    return float(bleu_of_counts(bleu_counts(hypotheses, references))[:, 3].mean())


def _ngrams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + order]) for start in range(len(words) - order + 1)]


def _distinct(captions: Captions, order: int) -> float:
    ngrams = [ngram for caption in captions for ngram in _ngrams(caption, order)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _share(truths: Iterable[bool]) -> float:
    values = list(truths)
    return sum(values) / len(values)
