"""Results to look at: how scores are spread, the best and worst images, the flow of gradients."""

import base64
import io
import os
import urllib.parse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from captioner.data.annotations import ImageId, image_path
from captioner.data.image_files import load_thumbnail
from captioner.data.near_names import near_names_hint, show_name
from captioner.errors import DataError, ImageError, UsageError, name_some
from captioner.files import atomic_write
from captioner.metrics.evaluation import Evaluation, printable
from captioner.metrics.scores import Scores

THUMBNAIL = 320  # pixels, the longer side
SHOWN = 24  # images at each end
LONGEST_TEXT = 400  # characters of a caption or name on the page
LONGEST_LABEL = 30  # characters of a result file's name in a plot


def write_plot(path: str | Path, scores: Mapping[str, Scores]) -> None:
    """Draw how each metric is spread over the images, as an image file.

    Raises:
        UsageError: matplotlib isn't installed, or it doesn't know the file's suffix.
    """
    plot_format(path)  # refused before anything is drawn
    save_figure(path, _draw_distributions(scores))


def new_figure(columns: int, rows: int, width: float = 3.2, height: float = 2.4) -> Any:
    """Return a matplotlib figure with room for so many axes, each of so many inches.

    Raises:
        UsageError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'captioner[report]'") from None
    return Figure(figsize=(width * columns, height * rows), layout="constrained")


def label_lines(axes: Any, labels: Mapping[str, Any]) -> None:
    """Write at the right end of lines what they are, in their colours, one below the other.

    Args:
        axes: Their axes, with their final limits.
        labels: The lines by what is to be written.
    """
    axes.get_ylim()  # limits that follow from the lines are set when they are asked for
    across = axes.transAxes.inverted()
    places = []
    for text, line in labels.items():
        points = axes.transData.transform(np.stack(line.get_data(), 1).astype(float))
        points = across.transform(points)
        seen = points[np.isfinite(points[:, 1]) & (points[:, 1] >= 0) & (points[:, 1] <= 1)]
        if len(seen):
            places.append((*seen[-1], text, line.get_color()))
    bottom = -1.0
    for x, y, text, colour in sorted(places, key=lambda place: place[1]):
        bottom = max(y, bottom + 0.06)
        style = {"color": colour, "fontsize": "x-small", "va": "center"}
        x = x if x < 0.95 else 1.0  # not across the frame
        axes.text(x + 0.01, bottom, text, transform=axes.transAxes, **style)


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a figure as an image file, whole or not at all.

    Raises:
        UsageError: matplotlib doesn't know the file's suffix.
    """
    suffix = plot_format(path)
    with atomic_write(path, "wb") as file:
        file.write(_encode_figure(figure, suffix))


def plot_format(path: str | Path) -> str:
    """Return the suffix that names a plot's format, or raise a ``UsageError``."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in ("png", "svg", "pdf"):
        raise UsageError(f"{path}: a plot's name must end in .png, .svg or .pdf")
    return suffix


def _encode_figure(figure: Any, suffix: str) -> bytes:
    """Return an image file; an SVG has its text as text, and is the same each time."""
    import matplotlib as mpl

    content = io.BytesIO()
    metadata = {"Date": None} if suffix == "svg" else None
    with warnings.catch_warnings(), mpl.rc_context():
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "captioner"})
        # Names in scripts that matplotlib's font lacks show as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(content, format=suffix, dpi=200, metadata=metadata)
    return content.getvalue()


def _draw_distributions(scores: Mapping[str, Scores]) -> Any:
    metrics = list(next(iter(scores.values())).per_image)
    columns = min(4, len(metrics))
    rows = -(-len(metrics) // columns)
    legend_height = 0.16 * len(scores) if len(scores) > 1 else 0.0  # inches
    figure = new_figure(columns, rows, height=2.4 + legend_height / rows)
    for place, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, place + 1)
        values = [file_scores.per_image[metric] for file_scores in scores.values()]
        highest = max(1e-9, *(float(value.max()) for value in values))
        bins = np.linspace(0, highest, 31).tolist()
        handles = [axes.hist(value, bins=bins, histtype="step")[2][0] for value in values]
        axes.set_title(metric)
        axes.set_ylabel("images")
    if len(scores) > 1:
        labels = map(_plot_label, scores)
        legend = figure.legend(handles, labels, fontsize="x-small", loc="outside lower left")
        for text in legend.get_texts():
            text.set_parse_math(False)  # a $ in a file's name is a $
    return figure


def _plot_label(name: str) -> str:
    label = _shorten(printable(name), LONGEST_LABEL)
    return f" {label}" if label.startswith("_") else label  # matplotlib hides labels with a _


def _shorten(text: str, longest: int) -> str:
    """Return text of at most about so many characters, the middle left out."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


@dataclass(frozen=True)
class _Picture:
    """An image on the page: its address, or why there is none."""

    address: str = ""
    problem: str = ""


@dataclass(frozen=True)
class _Card:
    """An image on the page with its captions, each with its file's name and score."""

    image_id: ImageId
    picture: _Picture
    captions: list[tuple[str, str, float]]
    references: list[str]


@dataclass(frozen=True)
class _Cell:
    """A number in the page's table, and what is known of how sure it is."""

    value: str = "-"
    note: str = ""


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    scores: Mapping[str, Scores],
    summary: Mapping[str, Any],
    images: str | Path | None = None,
    embed: bool = True,
) -> None:
    """Write a page that opens from disk: scores, their spread, the best and the worst images.

    Images are ordered by the first result file's CIDEr-D, or else the last metric computed.

    Args:
        path: The HTML file.
        evaluation: What was scored.
        scores: The scores of each result file.
        summary: What the command prints: its ``signature`` and each file's ``scores``.
        images: The folder that the references' file names are below; None shows no image.
        embed: Put small copies of the images into the page, instead of links to the files.

    Raises:
        UsageError: matplotlib isn't installed.
    """
    metric, best, worst = _choose_images(scores)
    keys = list(evaluation.references)

    def cards(places: Sequence[int]) -> list[_Card]:
        names = [evaluation.file_names.get(keys[place]) for place in places]
        pictures = [_picture(Path(path), name, images, embed) for name in names]
        return [
            _card(keys[place], place, evaluation, scores, metric, picture)
            for place, picture in zip(places, pictures, strict=True)
        ]

    page = _template().render(
        metrics=list(next(iter(summary["scores"].values()))),
        rows=_table(summary),
        signature=summary["signature"],
        plot=base64.b64encode(_encode_figure(_draw_distributions(scores), "png")).decode(),
        metric=metric,
        groups={"Best": cards(best), "Worst": cards(worst)},
        several_files=len(scores) > 1,
    )
    with atomic_write(path) as file:
        file.write(page)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("captioner.metrics", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # What can't be encoded is escaped wherever it comes from.
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shorten"] = lambda text: _shorten(text, LONGEST_TEXT)
    return environment.get_template("report.html.jinja")


def _choose_images(scores: Mapping[str, Scores]) -> tuple[str, list[int], list[int]]:
    """Return the metric that orders the images, and the places of the best and the worst."""
    first = next(iter(scores.values()))
    metric = "CIDEr-D" if "CIDEr-D" in first.per_image else list(first.per_image)[-1]
    order = [int(place) for place in np.argsort(-first.per_image[metric], kind="stable")]
    shown = min(SHOWN, -(-len(order) // 2))
    return metric, order[:shown], order[::-1][: min(shown, len(order) - shown)]


def _table(summary: Mapping[str, Any]) -> list[tuple[str, list[_Cell]]]:
    """Return the scores, with their intervals and the comparisons where they were computed."""
    files: Mapping[str, Mapping[str, float]] = summary["scores"]
    metrics = list(next(iter(files.values())))
    rows = []
    for name, values in files.items():
        intervals = summary.get("confidence_95", {}).get(name, {})
        notes = {metric: f"{low:.4f} to {high:.4f}" for metric, (low, high) in intervals.items()}
        cells = [_Cell(f"{values[metric]:.4f}", notes.get(metric, "")) for metric in metrics]
        rows.append((name, cells))
    comparisons = summary.get("comparisons", ())
    for first, second in dict.fromkeys((row["first"], row["second"]) for row in comparisons):
        differences = {
            row["metric"]: _Cell(f"{row['difference']:+.4f}", f"p = {row['p']:.3f}")
            for row in comparisons
            if (row["first"], row["second"]) == (first, second)
        }
        rows.append(
            (f"{second} \N{MINUS SIGN} {first}", [differences.get(m, _Cell()) for m in metrics])
        )
    return rows


def _card(
    key: ImageId,
    place: int,
    evaluation: Evaluation,
    scores: Mapping[str, Scores],
    metric: str,
    picture: _Picture,
) -> _Card:
    captions = [
        (evaluation.hypotheses[name][key], name, float(file_scores.per_image[metric][place]))
        for name, file_scores in scores.items()
    ]
    return _Card(key, picture, captions, evaluation.references[key])


def _picture(page: Path, name: str | None, images: str | Path | None, embed: bool) -> _Picture:
    if images is None or not name:
        return _Picture()
    try:
        file = image_path(images, name)
        if not os.path.isfile(file):
            return _Picture(problem=f"{name} is not in {images}")
        if embed:
            content = io.BytesIO()
            load_thumbnail(file, THUMBNAIL).save(content, "JPEG", quality=80)
            encoded = base64.b64encode(content.getvalue()).decode()
            return _Picture(f"data:image/jpeg;base64,{encoded}")
    except (DataError, ImageError) as error:
        return _Picture(problem=str(error))
    relative = os.path.relpath(file, page.parent).replace(os.sep, "/")
    return _Picture(urllib.parse.quote(os.fsencode(relative)))


def find_missing_images(evaluation: Evaluation, images: str | Path | None) -> list[str]:
    """Return a note where images of the references aren't in the folder; none without folder."""
    if images is None:
        return []
    names = [
        evaluation.file_names[key] for key in evaluation.references if key in evaluation.file_names
    ]
    if not names:
        return ["the references name no image files: the page will show no images"]
    missing = [name for name in names if not os.path.isfile(Path(images) / name)]
    if not missing:
        return []
    hint = near_names_hint(missing, os.listdir(images), str(images))
    return [
        f"{len(missing)} of {len(names)} images are not in {images} "
        f"({name_some(map(show_name, missing))}){hint}"
    ]
