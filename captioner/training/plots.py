"""Plots of a run beside its log: loss, scores, rate and learning rate over the optimiser steps."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from captioner.errors import UsageError
from captioner.metrics.report import label_lines, new_figure, save_figure
from captioner.progress import log_line
from captioner.training.tracking import read_log

PLOT_FILE = "training.png"
MOST_POINTS = 500  # of a line; beyond, means of neighbours
SCORES = {"BLEU-4": "C0", "CIDEr-D": "C1", "ROUGE-L": "C2"}  # and their colours

Rows = Sequence[Mapping[str, Any]]


def draw_training(output_dir: Path) -> None:
    """Draw what a run's log says as ``training.png`` beside it; where that fails, only warn.

    Args:
        output_dir: The run's folder.
    """
    path = output_dir / PLOT_FILE
    try:
        plot_training(path, read_log(output_dir / "log.jsonl"))
    except UsageError as error:
        _warn_once(f"{path} isn't drawn: {error}")
    except Exception as error:  # a plot must not end hours of training
        reason = getattr(error, "strerror", None) or error  # without the name of a temporary file
        _warn_once(f"{path} isn't drawn ({type(error).__name__}: {reason}); training goes on")


@cache
def _warn_once(message: str) -> None:
    log_line(f"warning: {message}")


def plot_training(path: str | Path, rows: Rows) -> None:
    """Draw loss, validation scores, rate and learning rate over optimiser steps, as an image file.

    Args:
        path: The image file.
        rows: All lines of a run's log.

    Raises:
        UsageError: matplotlib isn't installed, or it doesn't know the file's suffix.
    """
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    validations = [row for row in rows if row["kind"] in ("start", "epoch")]
    figure = new_figure(2, 2, width=4.8, height=3.0)
    figure.set_layout_engine(None)  # to fit everything in would take as long as to draw it
    figure.subplots_adjust(0.06, 0.08, 0.88, 0.94, wspace=0.25, hspace=0.2)
    (loss, scores), (rate, learning_rate) = figure.subplots(2, 2, sharex=True)
    for place in (loss, scores, rate, learning_rate):
        place.margins(x=0.02)
        place.grid(alpha=0.25)

    loss.set_title("training loss a token (dots: of the epoch)")
    _draw(loss, *_line(steps, "loss"), "C0", alpha=0.35)
    _draw(loss, *_line(epochs, "loss"), "C0", marker="o")
    scores.set_title("validation scores of freely decoded captions")
    labels = {}
    for name, colour in SCORES.items():
        x, y = _line(validations, name)
        line = _draw(scores, x, y, colour, marker="o")
        if len(y):
            labels[f"{name} {y[-1]:.3f}"] = line
    rate.set_title("training rate, images a second")
    _draw(rate, *_line(steps, "images_per_second"), "C0")
    learning_rate.set_title("learning rate")
    _draw(learning_rate, *_line(steps, "learning_rate"), "C0")
    for place in (rate, scores):
        place.set_ylim(bottom=0)
    label_lines(scores, labels)
    for place in (rate, learning_rate):
        place.set_xlabel(_step_label(epochs))
    save_figure(path, figure)


def _step_label(epochs: Rows) -> str:
    if not epochs:
        return "optimiser step"
    last = epochs[-1]
    return f"optimiser step ({last['step'] / last['epoch']:,.0f} an epoch)"


def _line(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of a line of at most ``MOST_POINTS`` points."""
    present = [row for row in rows if isinstance(row.get(name), int | float)]
    x = np.array([row["step"] for row in present], dtype=float)
    y = np.array([row[name] for row in present], dtype=float)
    size = -(-len(x) // MOST_POINTS)
    if size <= 1:
        return x, y
    starts = np.arange(0, len(x), size)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _draw(axes: Any, x: np.ndarray, y: np.ndarray, colour: str, **style: Any) -> Any:
    (line,) = axes.plot(x, y, color=colour, markersize=3, linewidth=1.2, **style)
    return line
