"""Gradients on their way back: how they vanish and explode, and what clipping makes of them."""

import math
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from captioner.metrics.report import label_lines, new_figure
from captioner.models.recurrent import RecurrentStack
from captioner.models.recurrent_cells import CELLS, INITIALISATIONS
from captioner.progress import progress_iter
from captioner.training.gradient_flow import Norms, gradient_norms
from experiments.recurrence.memory import adding_problem
from experiments.recurrence.pictures import COLOURS, Record, groups
from experiments.recurrence.study import History, LastStep, Setting, fit

DISTANCES = (1, 2, 5, 10, 20, 50, 100, 200)


def norms_of_last_steps(stack: RecurrentStack, x: Tensor, steps: int) -> Norms:
    """Return the norms of the gradient, from the last step back, of a loss on the last h alone.

    The loss is a random direction in h for each row: nothing in it prefers one cell.

    Args:
        stack: Of one layer.
        x: (rows, T, D).
        steps: How many steps back.
    """
    seen = stack.unroll(x)
    last = seen.outputs[:, -1]
    loss = (last * torch.randn_like(last)).sum()
    (norms,) = gradient_norms(loss, [layer[-steps - 1 :] for layer in seen.states])
    return {part: values[::-1] for part, values in norms.items()}


def gradient_distance(setting: Setting) -> list[Record]:
    """Gradient norm against distance in time, by cell and initialisation.

    Networks of 64 units that have learnt nothing yet read 1,000 random numbers; the loss is on the
    last h alone. How much of its gradient reaches the state so many steps back, as a share of what
    reaches the last state? In a vanilla RNN it is a product of as many Jacobians (Pascanu et al.
    2013, eq. 5). The state of an LSTM is h and c: the rows of `state` count both together, those of
    `h` and `c` each alone (`c` as a share of what reaches the last c). All is computed in float64.
    """
    length, most = setting.pick((1000, 200), (60, 50))
    kinds: list[tuple[str, str, float]] = [
        (cell, name, 1.0) for cell, name in product(CELLS, INITIALISATIONS) if cell != "lstm"
    ]
    kinds += [("lstm", name, bias) for name in INITIALISATIONS for bias in (0.0, 1.0, 4.0)]
    combinations = list(product(kinds, setting.pick(range(5), range(1))))
    records: list[Record] = []
    for (cell, name, bias), seed in progress_iter(
        combinations, "gradient_distance", len(combinations), "run"
    ):
        torch.manual_seed(seed)
        stack = RecurrentStack(cell, 16, 64, initialisation=name, forget_bias=bias).double()
        x = torch.randn(16, length, 16, dtype=torch.float64)
        start = name + (f", forget bias {bias:g}" if cell == "lstm" else "")
        for part, norms in norms_of_last_steps(stack, x, most).items():
            shares = {f"{d}_back": norms[d] / norms[0] for d in DISTANCES if d <= most}
            kept = [float(f"{norm / norms[0]:.4g}") for norm in norms]
            shown = {"cell": cell, "start": start, "of": part, "seed": seed}
            records.append({**shown, **shares, "share": kept})
    return records


def draw_gradient_distance(records: Sequence[Record]) -> Any:
    """Draw the whole state's share for each cell and start, and the parts of the LSTM's."""
    figure = new_figure(3, 2, 3.3, 2.7)
    frames = _starts_by_cell([record for record in records if record["of"] == "state"])
    parts = [r for r in records if r["start"] == "orthogonal, forget bias 4"]
    frames["lstm, orthogonal, forget bias 4"] = {
        {"state": "h and c"}.get(of, of): of_part
        for (of,), of_part in groups(parts, ("of",)).items()
    }
    for place, (title, curves) in enumerate(frames.items()):
        axes = figure.add_subplot(2, 3, place + 1)
        axes.set(title=title, xlim=(0, 280), xlabel="steps back")
        axes.set_ylabel("share of the gradient's norm")
        if place < len(frames) - 1:
            axes.set(yscale="log", ylim=(1e-36, 1e3))
        else:
            axes.set(xlim=(0, 70), ylim=(0, 1.1))
        lines = {}
        for style, (label, of_curve) in zip(("-", "--", ":"), curves.items(), strict=True):
            shares = torch.tensor([record["share"] for record in of_curve], dtype=torch.float64)
            means = shares.log().mean(0).exp()[: 51 if place == len(frames) - 1 else None]
            colour = COLOURS[of_curve[0]["cell"]]
            (lines[label],) = axes.plot(means, linestyle=style, color=colour, linewidth=1.2)
        label_lines(axes, lines)
    return figure


def _starts_by_cell(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Return the records of each frame by start, the LSTM's in a frame for each matrix."""
    frames: dict[str, dict[str, list[Record]]] = {}
    for (cell, start), of_start in groups(records, ("cell", "start")).items():
        matrix, _, bias = start.partition(", ")
        if cell != "lstm":
            frames.setdefault(cell, {})[start] = of_start
        elif matrix != "xavier":  # alike the orthogonal ones
            frames.setdefault(f"lstm, {matrix}", {})[bias] = of_start
    return frames


RADII = (0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5)
# What a network reads, and how it begins: next to nothing, so that tanh is nearly linear; or
# numbers of size 1, which saturate it.
REGIMES = {"tanh, input 1e-12": 1e-12, "tanh, input 1": 1.0}


def spectral_radius(setting: Setting) -> list[Record]:
    """Vanishing and exploding, by the spectral radius of the recurrent weights.

    Recurrent weights are a random orthogonal matrix times the radius, 64 tanh units, no training,
    60 steps, float64; the gradient's norm 50 steps back. `slope` is the factor by which it changes
    at each step back, and theory says: for a linear network it is the radius itself (the product of
    50 Jacobians, Pascanu et al. 2013, section 2.1), and the derivative of tanh can only make it
    less. Where the input is next to nothing, tanh is linear.
    """
    length, back = 60, 50
    combinations = list(product(REGIMES, RADII, setting.pick(range(5), range(1))))
    records: list[Record] = []
    for regime, radius, seed in progress_iter(
        combinations, "spectral_radius", len(combinations), "run"
    ):
        torch.manual_seed(seed)
        stack = RecurrentStack("rnn_tanh", 16, 64).double()
        with torch.no_grad():
            stack.layer_weights()[0][2].mul_(radius)
        x = REGIMES[regime] * torch.randn(16, length, 16, dtype=torch.float64)
        norms = norms_of_last_steps(stack, x, back)["state"]
        share = norms[back] / norms[0]
        records.append(
            {
                "regime": regime,
                "radius": radius,
                "seed": seed,
                f"{back}_back": share,
                "slope": share ** (1 / back),
                "share": [float(f"{norm / norms[0]:.4g}") for norm in norms],
            }
        )
    return records


def draw_spectral_radius(records: Sequence[Record]) -> Any:
    """Draw the shares over the distance beside theory's, and the slopes over the radius."""
    figure = new_figure(3, 1, 3.4, 3.0)
    for place, ((regime,), of_regime) in enumerate(groups(records, ("regime",)).items()):
        axes = figure.add_subplot(1, 3, place + 1)
        axes.set(title=f"{regime}, by radius", yscale="log", xlim=(0, 58), ylim=(1e-22, 1e11))
        axes.set(xlabel="steps back", ylabel="share of the gradient's norm")
        axes.text(1, 1e-21, "dotted: radius to the power of the steps", fontsize="x-small")
        lines: dict[str, Any] = {}
        for (radius,), of_radius in groups(of_regime, ("radius",)).items():
            shares = torch.tensor([record["share"] for record in of_radius], dtype=torch.float64)
            means = shares.log().mean(0).exp()
            (lines[f"{radius:g}"],) = axes.plot(means, color=COLOURS["rnn_tanh"], linewidth=1.2)
            theory = [radius**distance for distance in range(len(means))]
            axes.plot(theory, "k:", linewidth=0.8)
        label_lines(axes, lines)
    axes = figure.add_subplot(1, 3, 3)
    axes.axhline(1, color="0.7", linewidth=0.6)
    axes.set(xlabel="spectral radius", ylabel="factor a step back", xlim=(0.4, 2.5))
    axes.set(ylim=(0.3, 1.7), xticks=(0.5, 1.0, 1.5))
    gap = "\N{NO-BREAK SPACE}" * 2  # between a marker and its label
    ends = {f"{gap}theory": axes.plot(RADII, RADII, "k:", linewidth=0.8)[0]}
    look = {"color": COLOURS["rnn_tanh"], "markersize": 5}
    for marker, ((regime,), of_regime) in zip(
        "xo", groups(records, ("regime",)).items(), strict=True
    ):
        places, slopes = zip(*((r["radius"], r["slope"]) for r in of_regime), strict=True)
        (ends[f"{gap}{regime}"],) = axes.plot(places, slopes, marker, **look)
    label_lines(axes, ends)
    return figure


CLIPPINGS = {"none": (0.0, 0.0), "norm 1": (1.0, 0.0), "value 0.1": (0.0, 0.1)}


def exploding(setting: Setting) -> list[Record]:
    """Exploding gradients in training, with and without clipping.

    The adding problem, plain gradient descent at a rate of 0.01, 300 steps. What is shown is the
    norm of the gradient by all weights, a sum over all time steps: it explodes where the products
    of Jacobians of the study before do. Without clipping one such gradient throws the weights away
    for good (Pascanu et al. 2013). `infinite` is the share of the steps in which the norm is no
    finite number.
    """
    starts = [
        ("rnn_relu", "identity", 100),
        ("rnn_relu", "identity", 400),
        ("rnn_tanh", "orthogonal", 100),
        ("lstm", "orthogonal", 100),
    ]
    steps = setting.pick(300, 8)
    combinations = list(product(starts, CLIPPINGS, setting.seeds))
    records: list[Record] = []
    for (cell, start, length), clipping, seed in progress_iter(
        combinations, "exploding", len(combinations), "run"
    ):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = LastStep(1, RecurrentStack(cell, 2, 64, initialisation=start))
        history = _descend(model, setting.pick(length, length // 5), clipping, steps, generator)
        finite = [norm for norm in history.norms if math.isfinite(norm)]
        tail = history.losses[-min(50, steps) :]
        lost = history.diverged or statistics.fmean(tail) > 10
        records.append(
            {
                "cell": cell,
                "start": start,
                "length": length,
                "clipping": clipping,
                "seed": seed,
                "lost": float(lost),
                "steps": len(history.losses),
                "infinite": 1 - len(finite) / len(history.norms),
                "largest_norm": max(finite, default=None),
                "last_loss": None if lost else statistics.fmean(tail),
                "norms": [norm if math.isfinite(norm) else None for norm in history.norms],
            }
        )
    return records


def _descend(
    model: nn.Module, length: int, clipping: str, steps: int, generator: torch.Generator
) -> History:
    def loss_of(_: int) -> Tensor:
        x, y = adding_problem(32, length, generator)
        return mse_loss(model(x), y)

    clip, clip_value = CLIPPINGS[clipping]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return fit(model, loss_of, steps, optimizer, clip, clip_value)


def draw_exploding(records: Sequence[Record]) -> Any:
    """Draw the gradient's norm over the steps: a column for each cell, a row for each clipping.

    Each point is the largest norm of five steps; a cross is where a run was lost.
    """
    columns = groups(records, ("cell", "start", "length"))
    figure = new_figure(len(columns), len(CLIPPINGS), 2.5, 1.8)
    frames = figure.subplots(len(CLIPPINGS), len(columns), sharex=True, sharey=True, squeeze=False)
    steps = max(len(record["norms"]) for record in records)
    for place, ((cell, start, length), of_column) in enumerate(columns.items()):
        frames[0][place].set_title(f"{cell}, {start},\n{length} steps", color=COLOURS[cell])
        frames[-1][place].set_xlabel("training step")
        for row, (clipping,) in enumerate(groups(of_column, ("clipping",))):
            axes = frames[row][place]
            for record in (r for r in of_column if r["clipping"] == clipping):
                norms = [math.nan if norm is None else norm for norm in record["norms"]]
                peaks = [max(norms[i : i + 5]) for i in range(0, len(norms), 5)]
                look = {"color": COLOURS[cell], "linewidth": 0.9}
                axes.plot(range(0, len(norms), 5), peaks, **look)
                if record["lost"]:
                    axes.plot(len(norms) - 1, max(peaks[-1], 0.1), "kx", markersize=8, zorder=3)
            axes.axhline(1, color="0.8", linewidth=0.8, zorder=0)
            axes.set(yscale="log", xlim=(-0.05 * steps, 1.05 * steps))
            if not place:
                axes.set_ylabel(f"clipping: {clipping}\nnorm of the gradient")
    return figure
