"""Several models as one step function: the mean of their probabilities."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.search.beams import log_softmax
from captioner.search.decoding import StepFunction, Tensors


def ensemble_step(
    steps: Sequence[StepFunction], states: Sequence[Tensors], memories: Sequence[Tensors]
) -> StepFunction:
    """Return a step function that averages the probabilities of several models.

    Its state is the states of all models, one after another, and so is its memory. The logits
    that it returns are log-probabilities.

    Args:
        steps: Step functions of models with the same vocabulary.
        states: What each model starts from; only the number of tensors matters here.
        memories: The same for the models' memories.
    """

    def step(token_ids: Tensor, state: Tensors, memory: Tensors) -> tuple[Tensor, Tensors]:
        log_probs: list[Tensor] = []
        new_state: list[Tensor] = []
        for model_step, initial_state, initial_memory in zip(steps, states, memories, strict=True):
            state_size, memory_size = len(initial_state), len(initial_memory)
            logits, model_state = model_step(token_ids, state[:state_size], memory[:memory_size])
            state, memory = state[state_size:], memory[memory_size:]
            log_probs.append(log_softmax(logits))
            new_state += model_state
        return torch.stack(log_probs).logsumexp(0) - math.log(len(steps)), tuple(new_state)

    return step
