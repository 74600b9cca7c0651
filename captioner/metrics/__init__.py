"""Scores of captions against references. Nothing here imports torch."""

from collections.abc import Mapping, Sequence

from captioner.annotations import ImageId
from captioner.errors import DataError, UsageError, did_you_mean, name_some
from captioner.metrics.bleu import NAMES as BLEU_NAMES
from captioner.metrics.bleu import corpus_bleu
from captioner.tokenizer import tokenize

__all__ = ["BLEU_NAMES", "compute_metrics", "corpus_bleu"]


def compute_metrics(
    hypotheses: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    metrics: Sequence[str] = BLEU_NAMES,
) -> dict[str, float]:
    """Score one caption per image against the references of the same images.

    Args:
        hypotheses: A caption for each image id, as written (they are tokenised here).
        references: One or more captions for each of the same ids.
        metrics: Which scores to return.

    Returns:
        Each score asked for by its name, such as ``{"BLEU-4": 0.21}``.

    Raises:
        DataError: The ids differ, or an image has no reference.
        UsageError: There is no such metric.
    """
    for name in metrics:
        if name not in BLEU_NAMES:
            raise UsageError(f"no metric '{name}'{did_you_mean(name, BLEU_NAMES)}")
    if hypotheses.keys() != references.keys():
        odd = sorted(hypotheses.keys() ^ references.keys(), key=str)
        raise DataError(f"{len(odd)} images lack a caption or references ({name_some(odd)})")
    bare = [image_id for image_id, captions in references.items() if not captions]
    if bare or not references:
        raise DataError(f"{len(bare) or 'all'} images have no reference ({name_some(bare)})")
    hypothesis_tokens = [tokenize(caption) for caption in hypotheses.values()]
    reference_tokens = [[tokenize(c) for c in references[image_id]] for image_id in hypotheses]
    scores = corpus_bleu(hypothesis_tokens, reference_tokens)
    return {name: scores[name] for name in metrics}
