"""How much gradient reaches the recurrent state at each step back in time: measured and drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captioner.data.vocabulary import EOS, PAD
from captioner.metrics.report import new_figure, save_figure
from captioner.models.decoder import Decoder, State

LOG_KIND = "gradient_flow"  # the kind of its lines in log.jsonl


def gradient_norms(loss: Tensor, hidden: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """Return how much of the loss's gradient reaches h at each step, |dL/dh(t)|, mean over rows.

    The derivative is the whole one: through the output of the step, and through all later steps
    (Pascanu et al. 2013, eq. 3-5). The graph is kept, no parameter's ``grad`` is touched.

    Args:
        loss: Sum of the losses of the rows.
        hidden: For each layer its h at each step, (…, H).

    Returns:
        For each layer a norm for each step. 0 where the graph was cut.
    """
    flat = [h for layer in hidden for h in layer]
    gradients = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
    zero = loss.new_zeros(())
    norms = torch.stack([zero if g is None else g.norm(dim=-1).mean().to(zero) for g in gradients])
    values = iter(norms.tolist())
    return [[next(values) for _ in layer] for layer in hidden]


def measure_gradient_flow(
    decoder: Decoder, features: Tensor, token_ids: Tensor, bptt_window: int = 0
) -> dict[str, list[list[float]]]:
    """Measure how much gradient reaches h at each step, without dropout.

    Args:
        decoder: The decoder; neither it nor its gradients are changed.
        features: Of the image of each caption, (rows, N, D).
        token_ids: Captions of one length, from BOS to EOS: (rows, T + 1).
        bptt_window: As in ``Decoder.teacher_forcing``.

    Returns:
        Two lists of ``gradient_norms``, for each layer from the last step back to the first state:
        ``loss``, of the loss of all tokens, and ``end``, of that of each caption's EOS alone,
        which has come all the way from there.
    """
    was_training = decoder.training
    decoder.eval()
    states: list[State] = []
    output = decoder.teacher_forcing(features, token_ids.unsqueeze(1), bptt_window, states)
    decoder.train(was_training)
    layers = list(zip(*(decoder.hidden_states(state) for state in states), strict=True))
    losses = nn.functional.cross_entropy(output.logits, output.targets, reduction="none")
    parts = {"loss": losses.sum(), "end": losses[output.targets == EOS].sum()}
    norms = {name: gradient_norms(part, layers) for name, part in parts.items()}
    return {name: [layer[::-1] for layer in by_layer] for name, by_layer in norms.items()}


def equally_long_captions(token_ids: Tensor, count: int = 16) -> tuple[Tensor, Tensor]:
    """Choose captions of the commonest length out of a batch.

    Args:
        token_ids: (B, K, T + 1).
        count: How many at most.

    Returns:
        The image in the batch and the token ids of each: (rows,), (rows, T' + 1).
    """
    lengths = (token_ids != PAD).sum(-1)
    commonest = int(lengths[lengths > 0].mode().values)
    images, captions = (lengths == commonest).nonzero()[:count].unbind(1)
    return images, token_ids[images, captions, :commonest]


def plot_gradient_flow(path: str | Path, measurements: Sequence[Mapping[str, Any]]) -> None:
    """Draw how much gradient reached h at each step back in time, as an image file.

    Args:
        path: The image file.
        measurements: Lines of a run's log of the kind ``gradient_flow``, in order: ``step``, and
            what ``measure_gradient_flow`` gave. The first, the middle and the last are drawn.

    Raises:
        UsageError: matplotlib isn't installed, or it doesn't know the file's suffix.
    """
    layers = len(measurements[0]["loss"])
    titles = {"loss": "loss of all tokens", "end": "loss of the last token"}
    figure = new_figure(len(titles), layers, height=2.6)
    drawn = sorted({0, len(measurements) // 2, len(measurements) - 1})
    for layer in range(layers):
        for place, (name, title) in enumerate(titles.items()):
            axes = figure.add_subplot(layers, len(titles), layer * len(titles) + place + 1)
            for row in (measurements[i] for i in drawn):
                norms = np.array(row[name][layer])
                axes.plot(np.where(norms > 0, norms, np.nan), label=f"step {row['step']}")
            axes.set_yscale("log")
            axes.set_title(f"layer {layer + 1}: {title}", fontsize="small")
            axes.set_xlabel("steps back from the last")
            axes.set_ylabel("|dL/dh|")
            axes.legend(fontsize="x-small")
    save_figure(path, figure)
