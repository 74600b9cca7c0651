"""Greedy, beam, diverse beam and constrained beam search, and sampling: one loop for all.

The loop runs over a plain step function, batched over images and hypotheses; nothing here knows
the model behind it. The methods differ only in how they select the hypotheses that go on.

A hypothesis that takes EOS while it is among the best keeps its place in the beam; the others go on
in the remaining places. An image is finished when all its hypotheses are, or when no unfinished one
can overtake the best finished ones. After ``max_length`` words only EOS can follow.

Hypotheses are ranked by log-probability / length ** ``length_penalty``, where the length counts
EOS; those for which EOS was impossible come last. In diverse search the best of each group come
first. The order of hypotheses with equal scores is fixed: it is the same each time, and in any
batch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from captioner.config import SearchConfig
from captioner.data.vocabulary import BOS, EOS, PAD
from captioner.search.beams import Beams, Results, gather_beams
from captioner.search.constraints import CompiledConstraints
from captioner.search.hypothesis import Hypothesis
from captioner.search.rules import Constraints
from captioner.search.sampling import sample_next
from captioner.search.selection import Selection, select_best, select_diverse, select_in_banks

Tensors = tuple[Tensor, ...]

StepFunction = Callable[[Tensor, Tensors, Tensors], tuple[Tensor, Tensors]]
"""Takes the last tokens of all hypotheses (B, K), their state (tensors of (B, K, …)) and the memory
of their images (tensors of (B, …)); returns the logits of the next tokens (B, K, V) and the new
state."""


@torch.inference_mode()
def decode(
    step: StepFunction,
    state: Tensors,
    memory: Tensors,
    settings: SearchConfig,
    constraints: Constraints | None = None,
    image_keys: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Find captions for each image, by the method of the settings: see the top of this file.

    Args:
        step: The model, see ``StepFunction``.
        state: Of one hypothesis for each image, (B, 1, …); at least one tensor.
        memory: Of the images, (B, …).
        settings: Which search, how wide, and how many captions are wanted.
        constraints: What captions may and must contain; None only limits the length.
        image_keys: Integers (B,) that samples depend on, not on the batch; None takes 0, 1, 2, ….

    Returns:
        For each image its hypotheses, best first: at least one, at most ``n_best``. An image for
        which no caption meets the constraints has one without words, of log-probability -inf. An
        image for which the model gives NaN has none; it changes nothing for the others.
    """
    images, device = len(state[0]), state[0].device
    keys = torch.arange(images, device=device) if image_keys is None else image_keys.to(device)
    logits, state = step(torch.full((images, 1), BOS, device=device), state, memory)
    constraints = constraints or Constraints(max_length=settings.max_length)
    compiled = CompiledConstraints(constraints, logits.shape[2], device)
    beams = Beams(keys.long(), settings, compiled, logits.dtype)
    for _ in range(settings.max_length):
        selection = _select(beams.extend(logits), beams, settings)
        origin = beams.advance(selection)
        active = beams.drop_finished()
        if not len(beams):
            return _to_hypotheses(beams.results)
        if active is not None:
            memory = tuple(tensor[active] for tensor in memory)
        state = gather_beams(state, origin, active)
        logits, state = step(beams.last_tokens, state, memory)
    beams.finish_all(logits)
    return _to_hypotheses(beams.results)


def _select(log_probs: Tensor, beams: Beams, settings: SearchConfig) -> Selection:
    """Select the hypotheses that go on, of those with one token more, (B, K, V)."""
    forced = beams.constraints.forced
    if settings.samples:
        return sample_next(log_probs, settings, beams.image_keys, beams.length)
    if settings.groups > 1:
        return select_diverse(log_probs, settings.beam_size, settings.groups, settings.diversity)
    if forced is not None:
        words_met = forced.words_met_after(beams.phrase_states)
        return select_in_banks(log_probs, words_met, forced.total_words + 1, settings.beam_size)
    return select_best(log_probs, settings.beam_size)


def _to_hypotheses(results: Results) -> list[list[Hypothesis]]:
    """Read the results from the device."""
    columns = (results.token_ids, results.log_probs, results.finished)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [_image_hypotheses(*captions) for captions in rows]


def _image_hypotheses(
    token_ids: list[list[int]], log_probs: list[float], finished: list[bool]
) -> list[Hypothesis]:
    if any(map(math.isnan, log_probs)):
        return []
    hypotheses = [
        Hypothesis([token for token in ids if token not in (PAD, EOS)], log_prob, ended)
        for ids, log_prob, ended in zip(token_ids, log_probs, finished, strict=True)
        if log_prob != -math.inf
    ]
    return hypotheses or [Hypothesis([], -math.inf, False)]
