"""From Keras: weights of its recurrent layers in a ``RecurrentStack``, for the same outputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from captioner.models.recurrent import RecurrentStack

# Keras' layer, and where each of torch's gates lies in its kernels.
KERAS = {
    "rnn_tanh": ("SimpleRNN", (0,)),
    "lstm": ("LSTM", (0, 1, 2, 3)),  # i, f, c, o is torch's order
    "gru": ("GRU", (1, 0, 2)),  # z, r, h there; r, z, n here
}


def from_keras(cell: str, weights: Sequence[np.ndarray], **options: Any) -> RecurrentStack:
    """Return a stack of one layer that computes what a layer of Keras does.

    Args:
        cell: "rnn_tanh" for ``SimpleRNN``, "lstm" or "gru".
        weights: What ``layer.get_weights()`` returns: kernel (D, gates * H), recurrent kernel
            (H, gates * H) and bias, (gates * H,) or, for the GRU, (2, gates * H).
        options: ``return_sequences`` and ``return_state``, which mean what they mean there.

    Raises:
        ValueError: It is a GRU with ``reset_after=False``, or a layer without bias.
    """
    layer, order = KERAS[cell]
    if len(weights) != 3:
        raise ValueError(
            f"{layer}: kernel, recurrent kernel and bias were expected, found {len(weights)}"
        )
    kernel, recurrent, bias = (torch.tensor(np.asarray(part)) for part in weights)
    if cell == "gru" and bias.dim() != 2:
        raise ValueError(
            "GRU: reset_after=True was expected (Keras' default): torch's GRU is that one"
        )
    hidden = len(recurrent)
    biases = bias if bias.dim() == 2 else torch.stack([bias, torch.zeros_like(bias)])

    def in_torch_order(part: torch.Tensor) -> torch.Tensor:
        """Return (…, gates * H) as (gates * H, …)."""
        gates = part.split(hidden, -1)
        return torch.cat([gates[place] for place in order], -1).movedim(-1, 0)

    stack = RecurrentStack(cell, len(kernel), hidden, **options)
    (own,) = stack.layer_weights()
    theirs = (kernel, biases[0], recurrent, biases[1])
    with torch.no_grad():
        for parameter, part in zip(own, theirs, strict=True):
            parameter.copy_(in_torch_order(part))
    return stack
