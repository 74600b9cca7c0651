"""Pictures of the course: unrolled network, cells, shapes, gates, units, cost against gain."""

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from captioner.metrics.report import new_figure, save_figure
from experiments.recurrence.cells_at_work import PHOTOGRAPHS, SENTENCE
from experiments.recurrence.pictures import COLOURS, Record, groups
from experiments.recurrence.study import HERE

_WORDS = "#56B4E9"  # what comes in
_STATE = "#E69F00"  # the recurrent state
_ANSWER = "#009E73"  # what goes out


def _blank(axes: Any, width: float, height: float) -> None:
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")


def _box(axes: Any, x: float, y: float, text: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.35", "facecolor": colour, "alpha": 0.45, "edgecolor": "0.3"}
    axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **look: Any) -> None:
    properties = {"arrowstyle": "->", "color": "0.25", "shrinkA": 11, "shrinkB": 11, **look}
    axes.annotate("", end, start, arrowprops=properties)


def draw_unrolled() -> Any:
    """Draw the recurrent network as a loop, and unrolled over three steps."""
    figure = new_figure(1, 1, 7.0, 2.5)
    axes = figure.add_subplot()
    _blank(axes, 9, 3.1)
    _box(axes, 1, 0.4, "$x_t$", _WORDS)
    _box(axes, 1, 1.5, "cell", _STATE)
    _box(axes, 1, 2.6, "$h_t$", _ANSWER)
    _arrow(axes, (1, 0.4), (1, 1.5))
    _arrow(axes, (1, 1.5), (1, 2.6))
    axes.plot([1.22, 1.75, 1.75, 1], [1.5, 1.5, 0.95, 0.95], color="0.25", linewidth=1)
    axes.text(1.85, 1.2, "$h_{t-1}$", fontsize=9, va="center")
    axes.text(2.75, 1.5, "=", fontsize=16, va="center", ha="center")
    _box(axes, 3.7, 1.5, "$h_0$", "0.8")
    for step in (1, 2, 3):
        x = 3.7 + 1.6 * step
        _box(axes, x, 0.4, f"$x_{step}$", _WORDS)
        _box(axes, x, 1.5, "cell", _STATE)
        _box(axes, x, 2.6, f"$h_{step}$", _ANSWER)
        _arrow(axes, (x, 0.4), (x, 1.5))
        _arrow(axes, (x, 1.5), (x, 2.6))
        _arrow(axes, (x - 1.6, 1.5), (x, 1.5), shrinkA=14, shrinkB=14)
    return figure


SHAPES = {
    "one to one": (1, (0,), (0,), "photograph", "dog?"),
    "one to many": (4, (0,), (0, 1, 2, 3), "photograph", "words"),
    "many to one": (4, (0, 1, 2, 3), (3,), "words", "in order?"),
    "many to many, in step": (4, (0, 1, 2, 3), (0, 1, 2, 3), "words", "next words"),
    "many to many, one after the other": (
        6,
        (0, 1, 2),
        (3, 4, 5),
        "shuffled words",
        "words in order",
    ),
}


def draw_shapes() -> Any:
    """Draw the shapes of sequence problems: which steps read, and which answer."""
    widths = [steps + 0.8 for steps, *_ in SHAPES.values()]
    figure = new_figure(1, 1, 11, 2.2)
    axes = figure.subplots(1, len(SHAPES), width_ratios=widths)
    for frame, (title, shape) in zip(axes, SHAPES.items(), strict=True):
        steps, reads, answers, read, answer = shape
        _blank(frame, steps + 0.6, 4)
        frame.set_title("\n".join(textwrap.wrap(title, 18)), fontsize=9)
        for step in range(steps):
            x = 0.8 + step
            _box(frame, x, 2, " ", _STATE)
            if step:
                _arrow(frame, (x - 1, 2), (x, 2), shrinkA=8, shrinkB=8)
            if step in reads:
                _box(frame, x, 0.8, " ", _WORDS)
                _arrow(frame, (x, 0.8), (x, 2), shrinkA=8, shrinkB=8)
            if step in answers:
                _box(frame, x, 3.2, " ", _ANSWER)
                _arrow(frame, (x, 2), (x, 3.2), shrinkA=8, shrinkB=8)
        frame.text(0.8 + sum(reads) / len(reads), 0.1, read, ha="center", fontsize=7)
        frame.text(0.8 + sum(answers) / len(answers), 3.8, answer, ha="center", fontsize=7)
    return figure


def draw_cells() -> Any:
    """Draw what flows where in a vanilla cell, an LSTM and a GRU: products as circles."""
    figure = new_figure(3, 1, 4.2, 3.4)
    for place, draw in enumerate((_draw_vanilla, _draw_lstm, _draw_gru)):
        axes = figure.add_subplot(1, 3, place + 1)
        _blank(axes, 6, 5)
        axes.set_ylim(-0.3, 4.7)
        draw(axes)
    return figure


def _node(axes: Any, x: float, y: float, text: str) -> None:
    style = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": "0.3"}
    axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style)


def _path(axes: Any, *points: tuple[float, float], **look: Any) -> None:
    """Draw a line through places, with an arrow at its end."""
    for start, end in pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), color="0.25", linewidth=1)
    properties = {"arrowstyle": "->", "color": "0.25", "shrinkA": 0, "shrinkB": 10, **look}
    axes.annotate("", points[-1], points[-2], arrowprops=properties)


def _feed(axes: Any, *places: float) -> None:
    """Draw that h(t-1) and x(t) go into the gates at these places."""
    _box(axes, 0.6, 0.1, "$h_{t-1},\\ x_t$", _WORDS)
    axes.plot([1.25, places[-1]], [0.1, 0.1], color="0.25", linewidth=1)
    for x in places:
        _arrow(axes, (x, 0.1), (x, 1.0), shrinkA=0)


def _draw_vanilla(axes: Any) -> None:
    axes.set_title("vanilla RNN", fontsize=10)
    _box(axes, 0.6, 2.5, "$h_{t-1}$", _STATE)
    _box(axes, 3, 2.5, "tanh (or ReLU)", "white")
    _box(axes, 3, 0.6, "$x_t$", _WORDS)
    _box(axes, 5.4, 2.5, "$h_t$", _STATE)
    _arrow(axes, (0.6, 2.5), (2.2, 2.5), shrinkA=16)
    _arrow(axes, (3, 0.6), (3, 2.5))
    _arrow(axes, (3.7, 2.5), (5.4, 2.5), shrinkB=14)


def _draw_lstm(axes: Any) -> None:
    axes.set_title("LSTM: the upper path is c", fontsize=10)
    _box(axes, 0.6, 4.2, "$c_{t-1}$", _STATE)
    _feed(axes, 1.9, 2.75, 3.65, 4.7)
    _node(axes, 1.9, 4.2, "×")
    _node(axes, 3.2, 4.2, "+")
    _node(axes, 3.2, 2.9, "×")
    _box(axes, 5.5, 4.2, "$c_t$", _STATE)
    _node(axes, 4.7, 2.4, "×")
    _box(axes, 5.5, 1.0, "$h_t$", _ANSWER)
    for x, name in ((1.9, "$f_t$"), (2.75, "$i_t$"), (3.65, "$g_t$"), (4.7, "$o_t$")):
        _box(axes, x, 1.0, name, "white")
    _arrow(axes, (0.6, 4.2), (1.9, 4.2), shrinkA=14)
    _arrow(axes, (1.9, 4.2), (3.2, 4.2))
    _arrow(axes, (3.2, 2.9), (3.2, 4.2))
    _arrow(axes, (3.2, 4.2), (5.5, 4.2), shrinkB=12)
    _arrow(axes, (1.9, 1.0), (1.9, 4.2))
    _arrow(axes, (2.75, 1.0), (3.2, 2.9))
    _arrow(axes, (3.65, 1.0), (3.2, 2.9))
    _path(axes, (4.7, 4.2), (4.7, 2.4))
    axes.text(4.8, 3.3, "tanh", fontsize=8)
    _arrow(axes, (4.7, 1.0), (4.7, 2.4))
    _path(axes, (4.9, 2.4), (5.5, 2.4), (5.5, 1.0))


def _draw_gru(axes: Any) -> None:
    axes.set_title("GRU: the upper path is h", fontsize=10)
    _box(axes, 0.6, 4.2, "$h_{t-1}$", _STATE)
    _feed(axes, 2.2, 3.2, 4.6)
    _node(axes, 2.2, 4.2, "×")
    _node(axes, 4.1, 4.2, "+")
    _node(axes, 4.1, 2.9, "×")
    _box(axes, 5.5, 4.2, "$h_t$", _STATE)
    for x, name in ((2.2, "$z_t$"), (3.2, "$r_t$"), (4.6, "$n_t$")):
        _box(axes, x, 1.0, name, "white")
    _arrow(axes, (0.6, 4.2), (2.2, 4.2), shrinkA=14)
    _arrow(axes, (2.2, 4.2), (4.1, 4.2))
    _arrow(axes, (4.1, 2.9), (4.1, 4.2))
    _arrow(axes, (4.1, 4.2), (5.5, 4.2), shrinkB=12)
    _arrow(axes, (2.2, 1.0), (2.2, 4.2))
    _arrow(axes, (2.2, 1.0), (4.1, 2.9))
    axes.text(3.25, 2.3, "$1 - z_t$", fontsize=8)
    _arrow(axes, (3.2, 1.0), (4.6, 1.0))
    _arrow(axes, (4.6, 1.0), (4.1, 2.9))


# --- of the study cells_at_work -----------------------------------------------------------------


def draw_units(probes: Sequence[Record]) -> Any:
    """Draw sentences with words coloured by the one unit that tells most of each target."""
    import matplotlib

    figure = new_figure(1, 1, 8, 1.2 * len(probes))
    axes = figure.subplots(len(probes), 1)
    colours = matplotlib.colormaps["PuOr"]
    for frame, found in zip(axes, probes, strict=True):
        sentences = found["sentences"]
        _blank(frame, 100, 3.6)
        frame.set_aspect("auto")
        frame.set_title(
            f"unit {found['unit']}: {found['target']} (R² {found['one_unit']:.2f})",
            fontsize=9,
            loc="left",
        )
        values = [value for sentence in sentences for _, value in sentence]
        low, high = min(values), max(values)
        for row, sentence in enumerate(sentences):
            x = 0.5
            for word, value in sentence:
                shade = (value - low) / max(1e-9, high - low)
                ink = "black" if 0.2 < shade < 0.85 else "white"
                box = {"facecolor": colours(shade), "edgecolor": "none", "pad": 2}
                frame.text(
                    x, 3 - row * 1.2, word, family="monospace", fontsize=9, color=ink, bbox=box
                )
                x += 0.95 * len(word) + 1.4
    return figure


def draw_gates(photograph: Path, sentence: str, records: Sequence[Record]) -> Any:
    """Draw the units of each gate over a sentence about a photograph, before and after training.

    Args:
        photograph: Its file.
        sentence: What was read.
        records: With ``gates``, for each cell before and after training.
    """
    from matplotlib.image import imread

    gates = [
        (cell, gate)
        for (cell,), of_cell in groups(records, ("cell",)).items()
        for gate in of_cell[0]["gates"]
        if gate != "candidate"
    ]
    words = ["image", "start", *sentence.split()]
    figure = new_figure(1, 1, 2.1 * (1 + len(gates)), 5.2)
    grid = figure.add_gridspec(2, 1 + len(gates))
    axes = figure.add_subplot(grid[:, 0])
    axes.imshow(imread(photograph), cmap="gray")
    axes.set_title(textwrap.fill(sentence, 22), fontsize=9)
    axes.axis("off")
    drawn = []
    for column, (cell, gate) in enumerate(gates, 1):
        for row, record in enumerate(r for r in records if r["cell"] == cell):
            axes = figure.add_subplot(grid[row, column])
            axes.grid(visible=False)
            units = record["gates"][gate]["units"]
            image = axes.imshow(units, cmap="cividis", aspect="auto", vmin=0, vmax=1)
            drawn.append(axes)
            axes.set_yticks([])
            axes.set_xticks(range(len(words)), words if row else [], rotation=90, fontsize=7)
            when = f"after {record['epoch']} epochs" if row else "before training"
            axes.set_title(f"{cell}, {gate} gate\n{when}", fontsize=8, color=COLOURS[cell])
    figure.colorbar(image, ax=drawn, label="0 is shut, 1 is open", shrink=0.5)
    return figure


# --- cost against gain --------------------------------------------------------------------------


def draw_gains(rows: Sequence[Sequence[str]]) -> Any:
    """Draw what cells bring over the time that their training takes.

    Args:
        rows: As ``course.gains`` gives them, with the head and the line below it.
    """
    figure = new_figure(3, 1, 3.2, 2.8)
    labels = {4: "captions, CIDEr-D", 5: "next word, perplexity", 7: "adding: runs solved"}
    for place, (column, label) in enumerate(labels.items()):
        axes = figure.add_subplot(1, 3, place + 1)
        for row in rows[2:]:
            x, y = float(row[2]), float(row[column].split()[0])
            axes.plot(x, y, "o", color=COLOURS[row[0]], markersize=7)
            axes.annotate(
                row[0],
                (x, y),
                xytext=(6, 4),
                textcoords="offset points",
                color=COLOURS[row[0]],
                fontsize=8,
            )
        axes.set(xlabel="time of training (LSTM: 1)", ylabel=label)
        axes.set_xlim(0, 1.5 * max(float(row[2]) for row in rows[2:]))
        axes.margins(y=0.2)
        if column == 5:
            axes.invert_yaxis()  # up is better in all three
            axes.set_ylabel("next word: perplexity\n(the axis is turned)")
    return figure


def draw_course(
    folder: Path, cells_at_work: Sequence[Record], gains: Sequence[Sequence[str]]
) -> None:
    """Draw all pictures of the course.

    Args:
        folder: Where they go, as SVG.
        cells_at_work: The records of that study, whose LSTM's last epoch has the units.
        gains: As ``course.gains`` gives them.
    """
    trained = [r["probes"] for r in cells_at_work if r["cell"] == "lstm" and r.get("probes")][-1]
    gated = [r for r in cells_at_work if r.get("gates")]
    photograph = HERE / "lesson" / f"{PHOTOGRAPHS[0]}.jpg"
    pictures = {"unrolled": draw_unrolled(), "cells": draw_cells(), "shapes": draw_shapes()}
    pictures |= {"units": draw_units(trained), "gains": draw_gains(gains)}
    pictures["gates"] = draw_gates(photograph, SENTENCE, gated)
    for name, figure in pictures.items():
        save_figure(folder / f"{name}.svg", figure)
