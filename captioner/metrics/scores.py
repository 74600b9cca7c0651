"""Scores of captions against references, equal to the official COCO evaluation's.

``compute_metrics`` gives numbers for a corpus, ``score`` also those of each image. Nothing here
imports torch.
"""

import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from captioner.data.annotations import ImageId
from captioner.data.near_names import near_names_hint, show_name
from captioner.data.tokenizer import tokenize
from captioner.errors import DataError, UsageError, did_you_mean, name_some
from captioner.metrics import official
from captioner.metrics.bleu import NAMES as BLEU_NAMES
from captioner.metrics.bleu import bleu_counts, bleu_of_counts, corpus_bleu
from captioner.metrics.cider import DocumentFrequencies, cider
from captioner.metrics.official import UnavailableError
from captioner.metrics.rouge import rouge_l
from captioner.progress import progress_iter

__all__ = [
    "BLEU_NAMES",
    "METRICS",
    "DocumentFrequencies",
    "Scores",
    "UnavailableError",
    "compute_metrics",
    "corpus_bleu",
    "metric_names",
    "score",
]

METRICS = (*BLEU_NAMES, "ROUGE-L", "CIDEr-D", "CIDEr", "METEOR", "SPICE")


@dataclass
class Scores:
    """What scoring one set of captions gave.

    Attributes:
        corpus: Each metric's value, 0 to 1 (CIDEr 0 to 10).
        per_image: Each metric's value for each image, (B,), in the order of the hypotheses.
        bleu_counts: (B, 10), for resampling BLEU; None where BLEU wasn't asked for.
        unavailable: Why a metric couldn't be computed, by its name.
    """

    corpus: dict[str, float] = field(default_factory=dict)
    per_image: dict[str, np.ndarray] = field(default_factory=dict)
    bleu_counts: np.ndarray | None = None
    unavailable: dict[str, str] = field(default_factory=dict)


def metric_names(names: str | Iterable[str]) -> list[str]:
    """Spell out metrics: ``BLEU`` is four, ``all`` is every one; in their usual order.

    Args:
        names: Names out of ``METRICS``, or one text with commas between them.

    Raises:
        UsageError: There is no such metric, or none is named.
    """
    groups = {"BLEU": BLEU_NAMES, "ALL": METRICS} | {name.upper(): (name,) for name in METRICS}
    known = ("all", "BLEU", *METRICS)
    chosen: set[str] = set()
    for name in names.split(",") if isinstance(names, str) else names:
        if not isinstance(name, str):
            raise UsageError(f"a metric's name must be text, found {reprlib.repr(name)}")
        name = name.strip()
        if name and name.upper() not in groups:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise UsageError(f"no metric '{name}'{hint}")
        chosen.update(groups.get(name.upper(), ()))
    if not chosen:
        raise UsageError(f"no metric is named; there are {', '.join(known)}")
    return [name for name in METRICS if name in chosen]


def compute_metrics(
    hypotheses: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    metrics: str | Iterable[str] = ("BLEU",),
    frequencies: DocumentFrequencies | None = None,
) -> dict[str, float]:
    """Score one caption per image against the references of the same images.

    Args:
        hypotheses: A caption for each image id, as written (they are tokenised here).
        references: One or more captions for each of the same ids.
        metrics: Names out of ``METRICS``, or ``BLEU`` for its four, or ``all``; a list, or one
            text with commas. ``CIDEr-D`` is what the official tool prints as "CIDEr"; ``CIDEr``
            is the paper's other one.
        frequencies: Document frequencies for CIDEr, if not from these references.

    Returns:
        Each score by its name, such as ``{"BLEU-4": 0.21}``.

    Raises:
        DataError: The ids differ, an image has no reference, or a caption isn't text.
        UsageError: There is no such metric.
        UnavailableError: METEOR or SPICE was asked for and Java or a file is missing.
    """
    scores = score(hypotheses, references, metrics, frequencies)
    for reason in scores.unavailable.values():
        raise UnavailableError(reason)
    return scores.corpus


def score(
    hypotheses: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    metrics: str | Iterable[str] = ("BLEU",),
    frequencies: DocumentFrequencies | None = None,
) -> Scores:
    """Do what ``compute_metrics`` does, and keep the scores of each image.

    A metric that can't be computed here is left out, with the reason in ``unavailable``.
    """
    names = metric_names(metrics)
    _check(hypotheses, references, frequencies)
    hypothesis_tokens = [tokenize(caption) for caption in hypotheses.values()]
    ids = progress_iter(hypotheses, "tokenising", len(hypotheses), "image")
    reference_tokens = [[tokenize(text) for text in references[key]] for key in ids]
    return score_tokens(hypothesis_tokens, reference_tokens, names, frequencies)


def score_tokens(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    metrics: Sequence[str],
    frequencies: DocumentFrequencies | None = None,
) -> Scores:
    """Score captions that are tokenised already; the two lists are in the same order."""
    scores = Scores()
    # The official tools other than ROUGE-L split "22 3/4" (one token) again at its space.
    words = [_split_spaces(caption) for caption in hypotheses]
    captions = [[_split_spaces(caption) for caption in captions] for captions in references]
    if set(metrics) & set(BLEU_NAMES):
        scores.bleu_counts = bleu_counts(words, captions)
        corpus = bleu_of_counts(scores.bleu_counts.sum(axis=0))
        images = bleu_of_counts(scores.bleu_counts)
        for order, name in enumerate(BLEU_NAMES):
            _add(scores, metrics, name, images[:, order], float(corpus[order]))
    if "ROUGE-L" in metrics:
        _add(scores, metrics, "ROUGE-L", rouge_l(hypotheses, references))
    if {"CIDEr-D", "CIDEr"} & set(metrics):
        cider_d, plain = cider(words, captions, frequencies)
        _add(scores, metrics, "CIDEr-D", cider_d)
        _add(scores, metrics, "CIDEr", plain)
    for name, compute in (("METEOR", official.meteor), ("SPICE", official.spice)):
        if name in metrics:
            try:
                value, per_image = compute(hypotheses, references)
                _add(scores, metrics, name, per_image, value)
            except UnavailableError as error:
                scores.unavailable[name] = f"{name}: {error}"
    return scores


def _add(
    scores: Scores,
    metrics: Sequence[str],
    name: str,
    per_image: np.ndarray,
    corpus: float | None = None,
) -> None:
    if name in metrics:
        scores.per_image[name] = per_image
        scores.corpus[name] = float(per_image.mean()) if corpus is None else corpus


def _split_spaces(tokens: Sequence[str]) -> Sequence[str]:
    if any("\xa0" in token for token in tokens):
        return [part for token in tokens for part in token.split()]
    return tokens


def compare_ids(
    hypotheses: Mapping[ImageId, object], references: Mapping[ImageId, Collection[str]]
) -> tuple[list[str], str]:
    """Compare the images of the two sides.

    Returns:
        A line for each way in which they differ, with counts and ids, and a hint, as of
        ``near_names_hint``, where ids are spelt differently.
    """
    described = [key for key, captions in references.items() if captions]
    uncaptioned = [key for key in described if key not in hypotheses]
    unknown = [key for key in hypotheses if key not in references]
    undescribed = [key for key in hypotheses if key in references and not references[key]]
    lines = []
    if uncaptioned:
        lines.append(
            f"{len(uncaptioned)} of {len(described)} images of the references have no caption "
            f"(ids {_show_ids(uncaptioned)})"
        )
    if unknown:
        lines.append(
            f"{len(unknown)} captions are of images that the references don't have "
            f"(ids {_show_ids(unknown)})"
        )
    if undescribed:
        lines.append(f"{len(undescribed)} images have no reference (ids {_show_ids(undescribed)})")
    return lines, near_names_hint(unknown, uncaptioned, "the references")


def _show_ids(ids: Iterable[ImageId]) -> str:
    return name_some(map(show_name, ids))


def _check(
    hypotheses: Mapping[ImageId, str],
    references: Mapping[ImageId, Collection[str]],
    frequencies: DocumentFrequencies | None,
) -> None:
    """Refuse what isn't one caption and some references for each image."""
    for name, side in (("hypotheses", hypotheses), ("references", references)):
        if not isinstance(side, Mapping):
            raise DataError(f"{name}: a dict by image id was expected, found {reprlib.repr(side)}")
    for key, caption in hypotheses.items():
        if not isinstance(caption, str):
            raise DataError(
                f"hypotheses: image {show_name(key)} must have one caption, a text; found "
                f"{reprlib.repr(caption)}"
            )
    for key, captions in references.items():
        if isinstance(captions, str | bytes | Mapping) or not isinstance(captions, Collection):
            raise DataError(
                f"references: image {show_name(key)} must have a list of captions, found "
                f"{reprlib.repr(captions)}"
            )
        for caption in captions:
            if not isinstance(caption, str):
                raise DataError(
                    f"references: the captions of image {show_name(key)} must be texts, found "
                    f"{reprlib.repr(caption)}"
                )
    if frequencies is not None and not isinstance(frequencies, DocumentFrequencies):
        raise DataError(
            "frequencies: what DocumentFrequencies.load or .of returns was expected, found "
            f"{reprlib.repr(frequencies)}"
        )
    lines, hint = compare_ids(hypotheses, references)
    if lines:
        raise DataError("; ".join(lines) + hint)
    if not hypotheses:
        raise DataError("there is no image to score")
