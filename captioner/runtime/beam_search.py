"""Greedy and beam search in NumPy: what ``captioner.search`` finds, without torch.

Shape letters: B images that are still searched, K hypotheses of each, t tokens so far, V words.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from captioner.data.vocabulary import BOS, EOS, PAD
from captioner.errors import ConfigError
from captioner.search.hypothesis import Hypothesis
from captioner.search.rules import Constraints
from captioner.search_config import SearchConfig

Arrays = tuple[np.ndarray, ...]

StepFunction = Callable[[np.ndarray, Arrays, Arrays], tuple[np.ndarray, Arrays]]
"""Takes the last tokens (B, K), their state (B, K, …) and the memory of the images (B, …); returns
log-probabilities of the next tokens (B, K, V) and the new state."""

# What needs the whole of ``captioner.search``.
_WITH_TORCH_ALONE = ("forced", "samples", "groups")


def check_settings(settings: SearchConfig) -> None:
    """Refuse what this search doesn't do.

    Raises:
        ConfigError: Forced words, samples or diverse groups are asked for.
    """
    for name in _WITH_TORCH_ALONE:
        if getattr(settings, name) != getattr(SearchConfig(), name):
            raise ConfigError(
                f"search.{name} needs torch (captioner.Captioner); an exported captioner has "
                "greedy and beam search"
            )


def beam_search(
    step: StepFunction,
    state: Arrays,
    memory: Arrays,
    settings: SearchConfig,
    constraints: Constraints,
) -> list[list[Hypothesis]]:
    """Find captions for each image, as ``captioner.search.decoding.decode`` does.

    Args:
        step: The model.
        state: Of one hypothesis for each image, (B, 1, …).
        memory: Of the images, (B, …).
        settings: How wide, and how many captions are wanted.
        constraints: What captions may contain.

    Returns:
        For each image its hypotheses, best first; none where the model gives NaN.
    """
    images = len(state[0])
    results: list[list[Hypothesis]] = [[] for _ in range(images)]
    rows = np.arange(images)
    tokens = np.empty((images, 1, 0), dtype=np.int64)
    totals = np.zeros((images, 1), dtype=np.float32)  # log-probabilities; -inf: an empty place
    ended = np.zeros((images, 1), dtype=bool)
    last = np.full((images, 1), BOS)
    for length in range(settings.max_length + 1):
        log_probs, state = step(last, state, memory)
        if length == settings.max_length:
            tokens, totals, ended = _end_all(tokens, totals, ended, log_probs[..., EOS])
            going = np.zeros(len(rows), dtype=bool)
            origin = np.zeros_like(ended, dtype=np.int64)
        else:
            extended = _extend(log_probs, tokens, totals, ended, constraints)
            tokens, totals, ended, origin = _select(extended, tokens, totals, ended, settings)
            going = ~(_is_finished(tokens, totals, ended, settings) | np.isnan(totals).any(1))
        for row in np.flatnonzero(~going):
            results[rows[row]] = _best(tokens[row], totals[row], ended[row], settings)
        if not going.any():
            break
        place = np.flatnonzero(going)[:, np.newaxis]
        state = tuple(part[place, origin[going]] for part in state)
        memory = memory if going.all() else tuple(part[going] for part in memory)
        rows, tokens, totals, ended = rows[going], tokens[going], totals[going], ended[going]
        last = tokens[..., -1]
    return results


def _extend(
    log_probs: np.ndarray,
    tokens: np.ndarray,
    totals: np.ndarray,
    ended: np.ndarray,
    constraints: Constraints,
) -> np.ndarray:
    """Return the log-probabilities of all hypotheses with one token more, (B, K, V).

    One that has ended can only stay as it is: it has inf at PAD, to be selected before all others.
    """
    extended = log_probs + np.where(ended, -np.inf, totals)[..., np.newaxis].astype(np.float32)
    for image, beam in np.ndindex(*ended.shape):
        if ended[image, beam]:
            extended[image, beam, PAD] = np.inf
        else:
            excluded = constraints.excluded(tuple(tokens[image, beam].tolist()))
            extended[image, beam, list(excluded)] = -np.inf
    return extended


def _select(
    extended: np.ndarray,
    tokens: np.ndarray,
    totals: np.ndarray,
    ended: np.ndarray,
    settings: SearchConfig,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, totals and ended of the best, (B, K', …), and the place each comes from."""
    images, _, words = extended.shape
    flat = extended.reshape(images, -1)
    size = min(settings.beam_size, flat.shape[1])
    chosen = np.argpartition(-flat, size - 1, axis=1)[:, :size]  # NaN is last, and ends up nowhere
    chosen.sort(axis=1)  # equal ones in the order of their places
    values = np.take_along_axis(flat, chosen, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    chosen, values = (np.take_along_axis(part, order, 1) for part in (chosen, values))
    origin, new = chosen // words, chosen % words
    stays = values == np.inf
    row = np.arange(images)[:, np.newaxis]
    new_totals = np.where(stays, totals[row, origin], values)
    new_totals[np.isnan(flat).any(1)] = np.nan  # to be reported
    tokens = np.concatenate([tokens[row, origin], new[..., np.newaxis]], 2)
    return tokens, new_totals, stays | ((new == EOS) & (values > -np.inf)), origin


def _end_all(
    tokens: np.ndarray, totals: np.ndarray, ended: np.ndarray, of_end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let all hypotheses take EOS, whose log-probability (B, K) is given."""
    with_end = totals + of_end
    ending = ~ended & (with_end != -np.inf)
    last = np.where(ending, EOS, PAD)[..., np.newaxis]
    return np.concatenate([tokens, last], 2), np.where(ending, with_end, totals), ended | ending


def _is_finished(
    tokens: np.ndarray, totals: np.ndarray, ended: np.ndarray, settings: SearchConfig
) -> np.ndarray:
    """Tell for which images no better captions can be found, (B,)."""
    active = ~ended & (totals != -np.inf)
    scores = np.where(ended, _scores(tokens, totals, settings), -np.inf)
    wanted = min(settings.n_best, scores.shape[1])
    worst_wanted = -np.sort(-scores, axis=1)[:, wanted - 1]
    # Log-probabilities only fall, and cost least when divided by the greatest length.
    reachable = totals / np.float32((settings.max_length + 1) ** settings.length_penalty)
    best_reachable = np.where(active, reachable, -np.inf).max(1)
    return (best_reachable <= worst_wanted) | ~active.any(1)


def _scores(tokens: np.ndarray, totals: np.ndarray, settings: SearchConfig) -> np.ndarray:
    """Return what hypotheses are ranked by, (B, K)."""
    lengths = np.maximum((tokens != PAD).sum(-1), 1).astype(np.float32)
    return totals / lengths ** np.float32(settings.length_penalty)


def _best(
    tokens: np.ndarray, totals: np.ndarray, ended: np.ndarray, settings: SearchConfig
) -> list[Hypothesis]:
    """Return the best hypotheses of one image: those that ended before others, then by score."""
    if np.isnan(totals).any():
        return []
    order = np.lexsort((-_scores(tokens, totals, settings), ~ended))
    found = [
        Hypothesis(_words(tokens[place]), float(totals[place]), bool(ended[place]))
        for place in order[: settings.n_best]
        if totals[place] != -np.inf
    ]
    return found or [Hypothesis([], -math.inf, False)]


def _words(tokens: np.ndarray) -> list[int]:
    ids: Sequence[int] = tokens.tolist()
    return [token for token in ids if token not in (PAD, EOS)]
