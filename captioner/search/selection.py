"""Which hypotheses go on: the best of each image, of each diverse group, of each bank.

Every function takes ``log_probs`` (B, K, V): for each hypothesis of B images and each possible next
token, the log-probability of the hypothesis with that token. -inf marks what is forbidden, and inf
(at PAD) a hypothesis that has finished: it goes on unchanged, before all others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from captioner.data.vocabulary import EOS


class Selection(NamedTuple):
    """The hypotheses that go on.

    Attributes:
        log_probs: Theirs, (B, K'); -inf for an empty place.
        indices: Which they are of the K * V possible ones of their image, (B, K').
    """

    log_probs: Tensor
    indices: Tensor


def select_best(log_probs: Tensor, size: int) -> Selection:
    """Select the ``size`` best of each image; places that nothing is left for are empty."""
    flat = log_probs.flatten(1)
    best, indices = flat.topk(min(size, flat.shape[1]))
    missing = (0, size - best.shape[1])
    pad = torch.nn.functional.pad
    return Selection(pad(best, missing, value=-torch.inf), pad(indices, missing))


def select_diverse(log_probs: Tensor, size: int, groups: int, diversity: float) -> Selection:
    """Select the best of each group of hypotheses (Vijayakumar et al., 2016).

    The groups select one after another. A word loses ``diversity`` for each hypothesis of the
    earlier groups that took it at this step. Selected hypotheses keep their own log-probability.

    Args:
        log_probs: (B, K, V), see the top of this file.
        size: K', the hypotheses of all groups together.
        groups: Number of groups, a divisor of ``size``.
        diversity: In log-probability for each hypothesis.
    """
    images, places, words = log_probs.shape
    width = size // groups
    times_taken = log_probs.new_zeros((images, words))  # at this step
    selections = []
    for group in range(groups):
        start = group * width if places > 1 else 0  # all groups begin with the same hypothesis
        penalty = diversity * times_taken
        penalized = log_probs[:, start : start + width] - penalty.unsqueeze(1)
        best, indices = select_best(penalized, width)
        tokens = indices % words
        counts = (tokens != EOS) & (best.abs() < torch.inf)
        times_taken.scatter_add_(1, tokens, counts.to(times_taken.dtype))
        indices = indices + start * words
        unpenalized = log_probs.flatten(1).gather(1, indices)
        empty = best == -torch.inf
        selections.append(Selection(unpenalized.masked_fill(empty, -torch.inf), indices))
    return _concatenate(selections)


def select_in_banks(log_probs: Tensor, words_met: Tensor, banks: int, size: int) -> Selection:
    """Select the best of those with 0, 1, 2, … words of the forced phrases (Hokamp and Liu, 2017).

    Args:
        log_probs: (B, K, V), see the top of this file.
        words_met: How many words of the forced phrases each of them contains, (B, K, V).
        banks: How many different numbers of words there are.
        size: Hypotheses in each bank.

    Returns:
        The selection of (B, banks * size) hypotheses.
    """
    return _concatenate(
        [
            select_best(log_probs.masked_fill(words_met != bank, -torch.inf), size)
            for bank in range(banks)
        ]
    )


def _concatenate(selections: list[Selection]) -> Selection:
    log_probs, indices = zip(*selections, strict=True)
    return Selection(torch.cat(log_probs, 1), torch.cat(indices, 1))
