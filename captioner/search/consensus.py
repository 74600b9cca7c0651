"""Hypotheses ranked by what captions of such an image say, beside the model's own score.

Consensus reranking (Devlin et al. 2015; Mao et al. 2015) prefers, among the captions that a search
has found, the one that agrees most with captions of similar images. Here those captions are an
expectation: for each of many n-grams how much of it captions of the image should hold, which
``models.consensus`` computes from the CNN's features. Agreement is measured as CIDEr does
(Vedantam et al. 2015). Without torch.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from captioner.search.hypothesis import Hypothesis
from captioner.search_config import SearchConfig

T = TypeVar("T")

ORDERS = 4
NO_CONSENSUS = (
    "search.consensus: this captioner has none; tools/fit_consensus.py fits it, 0 leaves it out"
)


def count_ngrams(words: Sequence[T]) -> Iterator[Counter[tuple[T, ...]]]:
    """Yield for each order how often a caption's n-grams occur in it."""
    for order in range(1, ORDERS + 1):
        starts = range(len(words) - order + 1)
        yield Counter(tuple(words[start : start + order]) for start in starts)


@dataclass(frozen=True, eq=False)
class Ngrams:
    """The n-grams in which captions may agree, of orders 1 to 4.

    Attributes:
        token_ids: (G, 4), whole numbers; shorter n-grams end in -1.
        rarity: (G,): log(images / images with the n-gram in a caption).
        unseen: The rarity of all other n-grams.
    """

    token_ids: np.ndarray
    rarity: np.ndarray
    unseen: float

    @cached_property
    def _places(self) -> dict[tuple[int, ...], int]:
        rows = enumerate(self.token_ids.tolist())
        return {tuple(token for token in row if token >= 0): place for place, row in rows}

    @cached_property
    def _rarities(self) -> list[float]:
        rarities: list[float] = self.rarity.tolist()
        return rarities

    def content(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        rows = [[token for token in row if token >= 0] for row in self.token_ids.tolist()]
        return {"token_ids": rows, "rarity": self.rarity.tolist(), "unseen": self.unseen}

    @classmethod
    def of_content(cls, content: Any) -> "Ngrams":
        """Return what ``content`` gave.

        Raises:
            TypeError, ValueError, KeyError: It is something else.
        """
        token_ids = np.full((len(content["token_ids"]), ORDERS), -1, dtype=np.int32)
        for place, row in enumerate(content["token_ids"]):
            token_ids[place, : len(row)] = row
        rarity = np.array(content["rarity"], dtype=np.float32).reshape(len(token_ids))
        return cls(token_ids, rarity, float(content["unseen"]))

    def agreement(self, token_ids: Sequence[int], expected: np.ndarray) -> float:
        """Return how much a caption agrees with what is expected of its image.

        For each order the product of the caption's tf-idf vector, of length 1, and the expected
        one; averaged over the orders, times 10: CIDEr without clipping.

        Args:
            token_ids: The caption's words.
            expected: (G,), of each n-gram.
        """
        total = 0.0
        for counts in count_ngrams(token_ids):
            product = squares = 0.0
            for ngram, count in counts.items():
                place = self._places.get(ngram)
                weight = count * (self.unseen if place is None else self._rarities[place])
                squares += weight**2
                if place is not None:
                    product += weight * float(expected[place])
            if squares:
                total += product / math.sqrt(squares)
        return 10 * total / ORDERS


def without_consensus(search: SearchConfig) -> SearchConfig:
    """Return the settings that find all hypotheses that ``rerank`` chooses from."""
    return replace(search, consensus=0.0, n_best=search.samples or search.beam_size)


def rerank(
    found: Sequence[Sequence[Hypothesis]],
    expected: np.ndarray,
    ngrams: Ngrams,
    search: SearchConfig,
) -> list[list[Hypothesis]]:
    """Return the ``n_best`` hypotheses of each image by score and agreement, best first.

    Args:
        found: With the settings of ``without_consensus``.
        expected: (B, G).
        ngrams: The G n-grams.
        search: How to choose.
    """

    def rank(hypothesis: Hypothesis) -> tuple[bool, float]:
        return hypothesis.ended, hypothesis.score(search.length_penalty, search.consensus)

    chosen = []
    for hypotheses, of_image in zip(found, expected, strict=True):
        agreeing = [
            replace(each, agreement=ngrams.agreement(each.token_ids, of_image))
            for each in hypotheses
        ]
        chosen.append(sorted(agreeing, key=rank, reverse=True)[: search.n_best])
    return chosen
