"""What it means that weights are shared over time: any length, and steps that aren't features."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad

from captioner.metrics.report import label_lines, new_figure
from captioner.models.recurrent import RecurrentStack
from captioner.progress import progress_iter
from experiments.recurrence.memory import adding_problem
from experiments.recurrence.pictures import COLOURS, GREY, Record, colour_of, draw_lines, groups
from experiments.recurrence.sequences import forecasts
from experiments.recurrence.study import LastStep, Setting, batch_of, fit, train_models

TESTED = (50, 100, 200, 400)  # steps
TRAINED = 50


# --- any length -----------------------------------------------------------------------------------


class _Window(nn.Module):
    """A feed-forward layer over the last ``steps`` of a sequence; before its beginning are zeros.

    It can multiply a number by its mark: a rectified unit a step is enough.
    """

    def __init__(self, steps: int, units: int = 64) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.Sequential(nn.Linear(2 * steps, units), nn.ReLU(), nn.Linear(units, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(pad(x, (0, 0, self.steps, 0))[:, -self.steps :].flatten(1))


# The model and the learning rate: the cells' are those that the study "adding" found.
_READERS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "feed-forward, window of 50": (partial(_Window, 50), 3e-3),
    "feed-forward, window of 400": (partial(_Window, 400), 3e-3),
    "lstm": (lambda: LastStep(1, RecurrentStack("lstm", 2, 64)), 0.03),
    "gru": (lambda: LastStep(1, RecurrentStack("gru", 2, 64)), 0.03),
    "rnn_relu, identity (IRNN)": (
        lambda: LastStep(1, RecurrentStack("rnn_relu", 2, 64, initialisation="identity")),
        3e-3,
    ),
}


def any_length(setting: Setting) -> list[Record]:
    """Weights shared over time: trained at 50 steps, tested at up to 400.

    The adding problem (see `adding`). All are trained on 1,000 batches of 32 sequences of 50 steps,
    and tested on 2,000 sequences of each length. A feed-forward layer has weights of its own for
    each step of its window, so its weights grow with the window; what lies before the window it
    doesn't see, and weights of steps that were never used in training were never trained. A
    recurrent network has the same weights at each step, whatever the length. `error` is the mean
    squared error; whoever always says 1 has 0.167.
    """
    tested = setting.pick(TESTED, TESTED[:2])
    records: list[Record] = []
    combinations = list(product(_READERS, setting.seeds))
    for name, seed in progress_iter(combinations, "any_length", len(combinations), "run"):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        make, rate = _READERS[name]
        model = make()

        def loss_of(_: int, model: nn.Module = model, g: torch.Generator = generator) -> Tensor:
            x, y = adding_problem(32, TRAINED, g)
            return mse_loss(model(x), y)

        fit(model, loss_of, setting.pick(1000, 5), torch.optim.Adam(model.parameters(), lr=rate))
        record: Record = {"model": name, "seed": seed}
        record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        for length in tested:
            x, y = adding_problem(2000, length, torch.Generator().manual_seed(1000 + length))
            with torch.no_grad():
                record[f"error_{length}"] = float(mse_loss(model(x), y))
        records.append(record)
    return records


def _short(model: str) -> str:
    return model.removeprefix("feed-forward, ").replace(", identity", "")


def draw_any_length(records: Sequence[Record]) -> Any:
    """Draw the error over the length; and the weights over the window that can be read."""
    figure = new_figure(2, 1, 5.0, 3.4)
    axes = figure.add_subplot(1, 2, 1)
    tested = [length for length in TESTED if f"error_{length}" in records[0]]
    points = [
        {"model": _short(r["model"]), "length": n, "error": r[f"error_{n}"]}
        for r in records
        for n in tested
    ]
    axes.set(yscale="log")
    draw_lines(axes, points, "length", "error", ("model",), marker=".")
    axes.axhline(1 / 6, color="0.6", linestyle=":", zorder=0)
    axes.text(tested[0], 0.2, "always saying 1", fontsize="x-small", color="0.4", va="bottom")
    axes.set(title="trained at 50 steps", xlabel="length in the test, steps")
    axes.set_ylabel("mean squared error")
    axes = figure.add_subplot(1, 2, 2)
    windows = np.arange(1, TESTED[-1] + 1)
    units = 64
    sizes = [units * (2 * int(window) + 1) + units + 1 for window in windows]
    lines = {"feed-forward": axes.plot(windows, sizes, color=GREY)[0]}
    for name in ("lstm", "gru"):
        (record, *_) = [r for r in records if r["model"] == name]
        size = [record["parameters"]] * len(windows)
        (lines[name],) = axes.plot(windows, size, color=COLOURS[name])
    axes.set(xlim=(0, 1.3 * TESTED[-1]), title="weights of 64 units", xlabel="steps it can read")
    axes.set_ylabel("parameters")
    label_lines(axes, lines)
    return figure


# --- steps or features ----------------------------------------------------------------------------

_LAYOUTS = {"40 steps of 1": (40, 1), "8 steps of 5": (8, 5), "1 step of 40": (1, 40)}
_LONGER = 60  # values


class _Forecaster(nn.Module):
    """Reads values as steps of so many, the oldest first."""

    def __init__(self, cell: str, width: int) -> None:
        super().__init__()
        self.width = width
        self.read = LastStep(1, RecurrentStack(cell, width, 48))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x.unflatten(1, (-1, self.width)))


def steps_or_features(setting: Setting) -> list[Record]:
    """Time steps are not features: 40 values as 40 steps of 1, or as 1 step of 40.

    The forecast of `time_series`: of 40 values of the Mackey-Glass series the one 20 steps later.
    The same values are given one at a time, five at a time, or all at once, as 40 features of a
    single step. The last is a feed-forward layer: what comes first and what later is in its
    weights, not in its time. `error of 60` is that of the same network reading 60 values, without
    being trained again, where that can be done. `seconds` are those of training, beside others.
    """
    x, y, x_val, y_val = forecasts(setting.pick(6000, 800), _LONGER, ahead=20)
    window = 40
    cells = setting.pick(("lstm", "gru", "rnn_tanh"), ("gru",))
    chosen = {
        f"{cell}|{name}": (cell, width)
        for cell, (name, (_, width)) in product(cells, _LAYOUTS.items())
    }

    def loss_of(model: nn.Module, random: np.random.Generator) -> Tensor:
        rows = batch_of(len(x), random, 64)
        return mse_loss(model(x[rows, -window:]).squeeze(1), y[rows])

    def scores_of(model: nn.Module) -> Record:
        assert isinstance(model, _Forecaster)
        scores: Record = {"error": _error(model(x_val[:, -window:]), y_val)}
        scores["error_of_60"] = _error(model(x_val), y_val) if model.width < window else None
        return scores

    models: dict[str, Callable[[], nn.Module]] = {
        name: partial(_Forecaster, *arguments) for name, arguments in chosen.items()
    }
    steps = setting.pick(1000, 5)
    records = train_models("steps_or_features", setting, models, loss_of, scores_of, steps, 3e-3)
    for record in records:
        record["cell"], _, record["read_as"] = record.pop("model").partition("|")
    return records


def _error(forecast: Tensor, truth: Tensor) -> float:
    return float((forecast.squeeze(1) - truth).square().mean().sqrt())


def draw_steps_or_features(records: Sequence[Record]) -> Any:
    """Draw the error by how the values are read, and the weights that this takes."""
    figure = new_figure(2, 1, 4.6, 3.0)
    names = {"error": "error / standard deviation", "parameters": "parameters"}
    for place, (name, label) in enumerate(names.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        for shift, ((cell,), of_cell) in enumerate(groups(records, ("cell",)).items()):
            for row, (_, of_layout) in enumerate(groups(of_cell, ("read_as",)).items()):
                values = [record[name] for record in of_layout]
                height = row + 0.22 * (shift - 1)
                axes.plot(values, [height] * len(values), "o", color=colour_of(cell), alpha=0.7)
                style = {"color": colour_of(cell), "fontsize": "x-small", "va": "center"}
                place_of_text = {"xytext": (6, 0), "textcoords": "offset points", **style}
                axes.annotate(cell, (max(values), height), **place_of_text)
        rows = [layout for (layout,) in groups(records, ("read_as",))]
        axes.set_yticks(range(len(rows)), rows)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
        axes.set_xlim(0, 1.25 * max(record[name] for record in records))
    return figure
