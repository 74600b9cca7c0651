"""Greedy and beam search, batched over images, over a plain step function.

A step function takes the last tokens of all hypotheses (B, K), their state (tensors of
(B, K, …)) and the memory of their images (tensors of (B, …)), and returns the logits of the next
tokens (B, K, V) and the new state. Nothing here knows what is behind it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captioner.errors import SearchError
from captioner.vocabulary import BOS, EOS, PAD, UNK

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensors, Tensors], tuple[Tensor, Tensors]]

NEVER_WRITTEN = [PAD, BOS, UNK]


@dataclass(frozen=True)
class Hypothesis:
    """One caption that search found.

    Attributes:
        token_ids: Its words, without BOS and EOS.
        log_probability: Of the words, and of EOS if it ended.
        ended: Whether EOS follows; False only where the model gives EOS no probability.
    """

    token_ids: list[int]
    log_probability: float
    ended: bool


@torch.inference_mode()
def beam_search(
    step: Step,
    state: Tensors,
    memory: Tensors,
    beam_size: int,
    max_length: int,
    length_penalty: float = 0.0,
    n_best: int = 1,
) -> list[list[Hypothesis]]:
    """Find the most probable captions of each image.

    A hypothesis that takes EOS while it is among the ``beam_size`` best keeps its place in the
    beam; the others go on in the places that are left. An image is done when all its places have
    ended, or when no unfinished hypothesis can overtake the ``n_best`` best finished ones. After
    ``max_length`` words only EOS can follow. Hypotheses are ranked by log-probability / length **
    ``length_penalty``, where the length counts EOS; those for which EOS was impossible come last.
    A beam of 1 is greedy search.

    Args:
        step: See the top of this file.
        state: Of one hypothesis for each image, (B, 1, …).
        memory: Of the images, (B, …).
        beam_size: K.
        max_length: Most words in a caption.
        length_penalty: 0 ranks by the log-probability itself, 1 by its mean over the tokens.
        n_best: How many hypotheses are wanted of each image.

    Returns:
        For each image its hypotheses, best first: at least one, at most ``n_best`` and K.

    Raises:
        SearchError: The model gives NaN for some image.
    """
    images = len(state[0])
    beams = _Beams(images, beam_size, max_length, length_penalty, n_best, state[0].device)
    for _ in range(max_length):
        logits, state = step(beams.last_tokens, state, memory)
        origin = beams.advance(logits)
        state = tuple(_at(part, origin) for part in state)
        left = beams.take_out_finished()
        if left is not None:
            state = tuple(part[left] for part in state)
            memory = tuple(part[left] for part in memory)
        if not len(beams.images):
            return beams.results()
    logits, _ = step(beams.last_tokens, state, memory)
    beams.end_all(logits)
    return beams.results()


class _Beams:
    """The hypotheses of the images that are not done yet: B images, K places, t tokens.

    Attributes:
        images: Which image each row is, (B,).
        token_ids: (B, K, t); PAD after EOS.
        scores: Log-probabilities, (B, K); -inf marks a place that holds no hypothesis. NaN, once
            there, stays: ``topk`` takes it before all numbers.
        ended: Which hypotheses took EOS, (B, K).
        found: For each image its hypotheses, once it is done.
    """

    def __init__(
        self,
        images: int,
        size: int,
        max_length: int,
        length_penalty: float,
        n_best: int,
        device: torch.device,
    ) -> None:
        self.size, self.max_length, self.length_penalty = size, max_length, length_penalty
        self.n_best = n_best
        self.images = torch.arange(images, device=device)
        self.token_ids = torch.empty((images, 1, 0), dtype=torch.long, device=device)
        self.scores = torch.zeros((images, 1), device=device)
        self.ended = torch.zeros((images, 1), dtype=torch.bool, device=device)
        self.found: list[list[Hypothesis]] = [[] for _ in range(images)]

    @property
    def last_tokens(self) -> Tensor:
        """The tokens to go on from, (B, K)."""
        if not self.token_ids.shape[2]:
            return torch.full_like(self.ended, BOS, dtype=torch.long)
        return self.token_ids[..., -1]

    def advance(self, logits: Tensor) -> Tensor:
        """Give every place its next token; return from which place each comes, (B, K)."""
        _, places, words = logits.shape
        scores = self.scores.to(logits.dtype if logits.dtype == torch.float64 else torch.float32)
        totals = scores.unsqueeze(2) + torch.log_softmax(logits.to(scores.dtype), -1)
        totals[..., NEVER_WRITTEN] = -torch.inf
        # One that has ended goes on as itself, with PAD, and before all others.
        totals.masked_fill_(self.ended.unsqueeze(2), -torch.inf)
        totals[..., PAD].masked_fill_(self.ended, torch.inf)

        best, chosen = totals.flatten(1).topk(min(self.size, places * words))
        origin, tokens = chosen // words, chosen % words
        stays = best == torch.inf
        self.scores = torch.where(stays, _at(scores, origin), best)
        self.ended = stays | ((tokens == EOS) & (best > -torch.inf))
        self.token_ids = torch.cat([_at(self.token_ids, origin), tokens.unsqueeze(2)], 2)
        return origin

    def take_out_finished(self) -> Tensor | None:
        """Keep the results of images that are done; return the rows that are left, if fewer."""
        alive = ~self.ended & (self.scores > -torch.inf)
        ranks = self._ranks().masked_fill(~self.ended, -torch.inf)
        finished = ranks.topk(min(self.n_best, ranks.shape[1])).values[:, -1]
        # Log-probabilities only fall, and count least when spread over the longest caption.
        reachable = self.scores / (self.max_length + 1) ** self.length_penalty
        done = (reachable.masked_fill(~alive, -torch.inf).amax(1) <= finished) | ~alive.any(1)
        if not bool(done.any()):
            return None
        self._keep(done.nonzero().squeeze(1))
        left = (~done).nonzero().squeeze(1)
        for name in ("images", "token_ids", "scores", "ended"):
            setattr(self, name, getattr(self, name)[left])
        return left

    def end_all(self, logits: Tensor) -> None:
        """Let all that are left take EOS: their captions have ``max_length`` words."""
        ends = self.scores + torch.log_softmax(logits.to(self.scores.dtype), -1)[..., EOS]
        ending = ~self.ended & (ends != -torch.inf)  # NaN is let through, to be found
        self.scores = torch.where(ending, ends, self.scores)
        self.token_ids = nn.functional.pad(self.token_ids, (0, 1), value=PAD)
        self.token_ids[..., -1].masked_fill_(ending, EOS)
        self.ended = self.ended | ending
        self._keep(torch.arange(len(self.images), device=logits.device))

    def results(self) -> list[list[Hypothesis]]:
        """Return what was found for each image, unless the model gave NaN.

        Raises:
            SearchError: It did.
        """
        bad = sum(any(math.isnan(each.log_probability) for each in best) for best in self.found)
        if bad:
            raise SearchError(
                f"the model gives NaN instead of probabilities for {bad} of {len(self.found)} "
                "images; its weights are damaged or its numbers overflow: try float32 precision "
                "or another checkpoint"
            )
        return [best[: self.n_best] for best in self.found]

    def _ranks(self) -> Tensor:
        lengths = (self.token_ids != PAD).sum(2).clamp(min=1)
        return self.scores / lengths**self.length_penalty

    def _keep(self, rows: Tensor) -> None:
        ranks = self._ranks()[rows]
        # Those that ended come before those that were cut off.
        order = torch.argsort(ranks, dim=1, descending=True, stable=True)
        order = order.gather(1, torch.argsort(~_at(self.ended[rows], order), dim=1, stable=True))
        columns = (self.token_ids, self.scores, self.ended)
        tokens, scores, ended = (_at(column[rows], order).tolist() for column in columns)
        for row, image in enumerate(self.images[rows].tolist()):
            self.found[image] = [
                Hypothesis([t for t in ids if t not in (PAD, EOS)], score, end)
                for ids, score, end in zip(tokens[row], scores[row], ended[row], strict=True)
                if score != -math.inf
            ] or [Hypothesis([], -math.inf, False)]


def _at(part: Tensor, origin: Tensor) -> Tensor:
    """Return for each place what lies at ``origin``: (B, K, …) and (B, K') give (B, K', …)."""
    rows = torch.arange(len(part), device=part.device).unsqueeze(1)
    return part[rows, origin]
