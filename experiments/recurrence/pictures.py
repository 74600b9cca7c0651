"""How the studies' records are brought together and drawn: lines, maps, rows of dots."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from captioner.metrics.report import label_lines, new_figure

Record = dict[str, Any]

# One colour per cell in all pictures, told apart by colour-blind people too (Okabe and Ito 2008).
COLOURS = {"lstm": "#0072B2", "gru": "#009E73", "rnn_tanh": "#D55E00", "rnn_relu": "#CC79A7"}
GREY = "#666666"  # of what has no recurrence


def colour_of(name: str) -> str:
    """Return the colour of the cell that a name names last ("bag, then lstm"); grey without one."""
    named = {name.rfind(cell): colour for cell, colour in COLOURS.items() if cell in name}
    return named[max(named)] if named else GREY


def groups(records: Iterable[Record], keys: Sequence[str]) -> dict[tuple, list[Record]]:
    """Bring together the records that agree in these fields, in the order in which they came."""
    grouped: dict[tuple, list[Record]] = {}
    for record in records:
        grouped.setdefault(tuple(record[key] for key in keys), []).append(record)
    return grouped


def mean(records: Sequence[Record], name: str) -> float:
    """Return the mean of a field over the records that have it; NaN if none has."""
    values = [record[name] for record in records if record.get(name) is not None]
    return statistics.fmean(values) if values else math.nan


def format_number(value: float) -> str:
    """Return a number with three digits, a whole one below 10^9 with all."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def draw_lines(
    axes: Any,
    records: Sequence[Record],
    x: str,
    y: str,
    by: Sequence[str],
    linear: bool = False,
    **style: Any,
) -> None:
    """Draw y over x, a line for each group: mean over seeds in a band of the extremes.

    The scale of y must be set before: the lines are labelled at their ends.

    Args:
        axes: Where.
        records: What.
        x: The field across; on a logarithmic scale unless ``linear``.
        y: The field upwards.
        by: The fields of a group.
        linear: See ``x``.
        style: Of the lines.
    """
    places = sorted({record[x] for record in records})
    lines = {}
    for key, of_group in groups(records, by).items():
        points = sorted(groups(of_group, (x,)).items())
        known = [(p[0], [r[y] for r in of_x if r.get(y) is not None]) for p, of_x in points]
        known = [(place, values) for place, values in known if values]
        name, drawn = ", ".join(map(str, key)), [place for place, _ in known]
        look = {"color": colour_of(name), **style}
        (lines[name],) = axes.plot(drawn, [statistics.fmean(v) for _, v in known], **look)
        low, high = ([f(values) for _, values in known] for f in (min, max))
        axes.fill_between(drawn, low, high, alpha=0.15, color=look["color"], linewidth=0)
    axes.set_xscale("linear" if linear else "log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    # Room for the labels.
    width = places[-1] / places[0] if len(places) > 1 else 2.0
    if linear:
        axes.set_xlim(places[0] - 0.05 * width, places[-1] + 0.3 * width)
    else:
        axes.set_xlim(places[0] / width**0.05, places[-1] * width**0.4)
    axes.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    label_lines(axes, lines)


def draw_map(
    axes: Any, records: Sequence[Record], x: str, y: str, colour: str, number: str
) -> None:
    """Draw a map: the mean of ``colour``, 0 to 1, in each place, that of ``number`` as text.

    Where no record of a place has a number there is a dash; a cross for each run that ``died``.
    """
    columns, rows = ([key for (key,) in groups(records, (name,))] for name in (x, y))
    axes.grid(visible=False)
    values = [[math.nan for _ in columns] for _ in rows]
    for (row, column), of_place in groups(records, (y, x)).items():
        place = columns.index(column), rows.index(row)
        shade = values[place[1]][place[0]] = mean(of_place, colour)
        value = mean(of_place, number)
        text = f"{value:.2f}" if 0 < abs(value) < 1 else "–" if math.isnan(value) else f"{value:g}"
        text = f"{value:,.0f}" if value > 10 else text
        crosses = "×" * sum(record.get("died", 0) > 0 for record in of_place)
        ink = "black" if shade > 0.6 else "white"
        text = f"{text} {crosses}".removeprefix("– " if crosses else "")
        axes.text(*place, text, ha="center", va="center", fontsize="small", color=ink)
    image = axes.imshow(values, cmap="cividis", aspect="auto", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), [f"{c:g}" if isinstance(c, float) else c for c in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    if colour != number:
        axes.figure.colorbar(image, ax=axes, label=colour.replace("_", " "), shrink=0.8)


def draw_dots(axes: Any, records: Sequence[Record], by: str, y: str, label: str = "") -> None:
    """Draw a row for each group: a dot for each seed, the mean as a stroke and in numbers.

    The interval from y_low to y_high, where records have it, is a line, a mean over seeds. The
    axis shows the range of the cells, cut from 0 where they differ by little; a row far outside of
    it, a baseline, is an arrow at the edge.
    """
    rows = groups(records, (by,))
    _set_range(axes, rows, y, label or y.replace("_", " "))
    low, high = axes.get_xlim()
    for place, ((name,), of_row) in enumerate(rows.items()):
        colour, middle = colour_of(name), mean(of_row, y)
        beside = {"va": "center", "transform": axes.get_yaxis_transform()}
        if math.isnan(middle):  # it wasn't measured of this one
            axes.text(1.02, place, "-", **beside)
            continue
        axes.text(1.02, place, format_number(middle), **beside)
        if not low <= middle <= high:
            end, side = (0.0, "left") if middle < low else (1.0, "right")
            text = "◀ beyond the axis" if end == 0 else "beyond the axis ▶"
            axes.text(end, place, text, ha=side, color=colour, fontsize="small", **beside)
            continue
        values = [record[y] for record in of_row if record.get(y) is not None]
        interval = [mean(of_row, f"{y}_{end}") for end in ("low", "high")]
        axes.plot(interval, [place] * 2, color=colour, alpha=0.35, linewidth=5)
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=5, alpha=0.7)
        axes.plot([middle], [place], "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), [name for (name,) in rows])
    for tick, (name,) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(colour_of(name))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def _set_range(axes: Any, rows: Mapping[tuple, Sequence[Record]], y: str, label: str) -> None:
    """Set the limits of x; mark the axis where it doesn't begin at 0."""
    names = (y, f"{y}_low", f"{y}_high")
    values = {
        name: [record[n] for record in of_row for n in names if record.get(n) is not None]
        for (name,), of_row in rows.items()
    }
    cells = [v for name, each in values.items() if colour_of(name) != GREY for v in each]
    width = max(cells) - min(cells) or max(cells) or 1.0
    near = [v for each in values.values() for v in each]
    near = [v for v in near if min(cells) - 4 * width <= v <= max(cells) + 4 * width]
    low, high = min(near), max(near)
    margin = 0.08 * (high - low or width)
    is_cut = low > 0.25 * high
    axes.set_xlim(low - margin if is_cut else min(0.0, low), high + margin)
    if is_cut:
        axes.text(0, 0, "//", transform=axes.transAxes, ha="center", va="center", weight="bold")
        label += "\n(the axis is cut: it doesn't begin at 0)"
    axes.set_xlabel(label)


def draw_models(labels: Mapping[str, str], records: Sequence[Record]) -> Any:
    """Draw a row of dots for each model, a frame for each of the fields that are labelled."""
    rows = len(groups(records, ("model",)))
    figure = new_figure(len(labels), 1, 5.0, 1.0 + 0.3 * rows)
    for place, (name, label) in enumerate(labels.items()):
        axes = figure.add_subplot(1, len(labels), place + 1)
        draw_dots(axes, records, "model", name, label)
    return figure
