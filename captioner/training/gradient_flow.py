"""How much gradient reaches the recurrent state at each step back in time: measured and drawn."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captioner.data.vocabulary import EOS, PAD
from captioner.metrics.report import new_figure, save_figure
from captioner.models.decoder import Decoder, State

LOG_KIND = "gradient_flow"  # the kind of its lines in log.jsonl


# What is told of a layer: its whole state, and for an LSTM also h and c each alone.
Norms = dict[str, list[float]]


def gradient_norms(loss: Tensor, layers: Sequence[Sequence[State]]) -> list[Norms]:
    """Return how much of a loss's gradient reaches a recurrent state at each step, mean over rows.

    The derivative is the whole one: through the output of the step, and through all later steps
    (Pascanu et al. 2013, eq. 3-5). Norms are taken in float64: squares of small numbers are 0 in
    float32. The graph is kept, no parameter's ``grad`` is touched.

    Args:
        loss: Sum of the losses of the rows.
        layers: For each layer its state at each step, as the graph holds it: h, or h and c, (…, H)
            each.

    Returns:
        For each layer lists of a norm for each step, 0 where the graph was cut: ``state``, of the
        gradient by h, or by h and c together as the two inputs of what follows; for an LSTM also
        ``h``, and ``c``, which counts what goes through the h of the same step too.
    """
    flat = [part for layer in layers for state in layer for part in state]
    gradients = iter(_gradients(loss, flat))
    norms: list[Norms] = []
    for layer in layers:
        of_layer: Norms = {}
        for state in layer:
            parts = [next(gradients) for _ in state]
            found = {"state": parts}
            if len(state) == 2:
                h, c = parts
                (through_h,) = _gradients(state[0], [state[1]], h)
                found = {"state": [h, c - through_h], "h": [h], "c": [c]}
            for name, of_state in found.items():
                norm = torch.cat(of_state, -1).double().norm(dim=-1).mean()
                of_layer.setdefault(name, []).append(norm.item())
        norms.append(of_layer)
    return norms


def _gradients(
    output: Tensor, inputs: Sequence[Tensor], of_output: Tensor | None = None
) -> list[Tensor]:
    """Return the gradient by each input, zeros where the output doesn't depend on it."""
    zeros = [torch.zeros_like(each) for each in inputs]
    if not output.requires_grad:
        return zeros
    found = torch.autograd.grad(output, inputs, of_output, retain_graph=True, allow_unused=True)
    return [zero if each is None else each for zero, each in zip(zeros, found, strict=True)]


def measure_gradient_flow(
    decoder: Decoder, features: Tensor, token_ids: Tensor, bptt_window: int = 0
) -> dict[str, list[Norms]]:
    """Measure how much gradient reaches the recurrent state at each step, without dropout.

    Args:
        decoder: The decoder; neither it nor its gradients are changed.
        features: Of the image of each caption, (rows, N, D).
        token_ids: Captions of one length, from BOS to EOS: (rows, T + 1).
        bptt_window: As in ``Decoder.teacher_forcing``.

    Returns:
        What ``gradient_norms`` gives, from the last step back to the first state: ``loss``, of the
        loss of all tokens, and ``end``, of that of each caption's EOS alone, which has come all the
        way from there.
    """
    was_training = decoder.training
    decoder.eval()
    states: list[State] = []
    output = decoder.teacher_forcing(features, token_ids.unsqueeze(1), bptt_window, states)
    decoder.train(was_training)
    layers = list(zip(*(decoder.layer_states(state) for state in states), strict=True))
    losses = nn.functional.cross_entropy(output.logits, output.targets, reduction="none")
    parts = {"loss": losses.sum(), "end": losses[output.targets == EOS].sum()}
    return {
        name: [
            {part: values[::-1] for part, values in layer.items()}
            for layer in gradient_norms(loss, layers)
        ]
        for name, loss in parts.items()
    }


def flow_numbers(flow: Mapping[str, Sequence[Norms]]) -> dict[str, float]:
    """Return some numbers of what ``measure_gradient_flow`` gave by name, for W&B."""
    return {
        f"gradient_flow/{name}/layer{number}/{part}/back{back}": norms[back]
        for name, layers in flow.items()
        for number, layer in enumerate(layers)
        for part, norms in layer.items()
        for back in (0, 1, 2, 4, 8, 16)
        if back < len(norms)
    }


def logged_flow(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the measurements in a run's log, without those of before norms had names."""
    measured = (row for row in rows if row["kind"] == LOG_KIND)
    return [row for row in measured if all(isinstance(layer, dict) for layer in row["end"])]


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
        measurements: What ``logged_flow`` gave: ``step``, and what ``measure_gradient_flow`` did.
            The first, the middle and the last are drawn.

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
                _draw_norms(axes, row[name][layer]["state"], label=f"step {row['step']}")
            last = measurements[-1]
            for part, style in {"h": "--", "c": ":"}.items():
                if part in last[name][layer]:
                    label = f"{part} alone, step {last['step']}"
                    _draw_norms(axes, last[name][layer][part], style, color="0.5", label=label)
            axes.set_yscale("log")
            axes.set_title(f"layer {layer + 1}: {title}", fontsize="small")
            axes.set_xlabel("steps back from the last")
            axes.set_ylabel("norm of the state's gradient")
            axes.legend(fontsize="x-small")
    save_figure(path, figure)


def _draw_norms(axes: Any, norms: Sequence[float], *style: str, **look: Any) -> None:
    values = np.array(norms)
    axes.plot(np.where(values > 0, values, np.nan), *style, **look)
