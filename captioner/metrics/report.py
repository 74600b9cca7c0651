"""Results to look at: how scores are spread, the best and worst images, the flow of gradients."""

import base64
import html
import io
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from captioner.data.annotations import ImageId
from captioner.errors import UsageError
from captioner.files import atomic_write
from captioner.metrics.evaluation import Evaluation
from captioner.metrics.scores import Scores

THUMBNAIL = 320  # pixels, the longer side
SHOWN = 24  # images at each end


def write_plot(path: str | Path, scores: Mapping[str, Scores]) -> None:
    """Draw how each metric is spread over the images, as an image file.

    Raises:
        UsageError: matplotlib isn't installed, or it doesn't know the file's suffix.
    """
    _image_kind(path)  # refused before anything is drawn
    save_figure(path, _spread(scores))


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


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a figure as an image file, whole or not at all.

    Raises:
        UsageError: matplotlib doesn't know the file's suffix.
    """
    kind = _image_kind(path)
    with atomic_write(path, "wb") as file:
        file.write(_image(figure, kind))


def _image_kind(path: str | Path) -> str:
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise UsageError(f"{path}: a plot's name must end in .png, .svg or .pdf")
    return kind


def _image(figure: Any, kind: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()


def _spread(scores: Mapping[str, Scores]) -> Any:
    metrics = list(next(iter(scores.values())).per_image)
    columns = min(4, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = new_figure(columns, rows)
    for place, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, place + 1)
        values = [
            of_file.per_image[metric] for of_file in scores.values() if metric in of_file.per_image
        ]
        bins = np.linspace(0, max(1e-9, max(float(value.max()) for value in values)), 31).tolist()
        for name, value in zip(scores, values, strict=False):
            axes.hist(value, bins=bins, histtype="step", label=name)
        axes.set_title(metric)
        axes.set_ylabel("images")
        if len(scores) > 1 and place == 0:
            axes.legend(fontsize="x-small")
    return figure


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

    def cards(places: list[int]) -> str:
        names = [evaluation.file_names.get(keys[place]) for place in places]
        pictures = [_picture(Path(path), name, images, embed) for name in names]
        return "\n".join(
            _card(keys[place], place, evaluation, scores, metric, picture)
            for place, picture in zip(places, pictures, strict=True)
        )

    page = _PAGE.format(
        table=_table(summary),
        signature=html.escape(str(summary["signature"])),
        plot=base64.b64encode(_image(_spread(scores), "png")).decode(),
        metric=html.escape(metric),
        best=cards(best),
        worst=cards(worst),
    )
    with atomic_write(path) as file:
        file.write(page)


def _choose_images(scores: Mapping[str, Scores]) -> tuple[str, list[int], list[int]]:
    """Return the metric that orders the images, and the places of the best and the worst."""
    first = next(iter(scores.values()))
    metric = "CIDEr-D" if "CIDEr-D" in first.per_image else list(first.per_image)[-1]
    order = [int(place) for place in np.argsort(-first.per_image[metric], kind="stable")]
    shown = min(SHOWN, -(-len(order) // 2))
    return metric, order[:shown], order[::-1][: min(shown, len(order) - shown)]


def _table(summary: Mapping[str, Any]) -> str:
    """Return the scores, with their intervals and the comparisons where they were computed."""
    files: Mapping[str, Mapping[str, float]] = summary["scores"]
    metrics = list(next(iter(files.values())))
    lines = []
    for name, values in files.items():
        intervals = summary.get("confidence_95", {}).get(name, {})
        cells = [f"{values[metric]:.4f}" if metric in values else "-" for metric in metrics]
        for place, metric in enumerate(metrics):
            if metric in intervals:
                low, high = intervals[metric]
                cells[place] += f"<br><small>{low:.4f} to {high:.4f}</small>"
        lines.append([_escape(name), *cells])
    comparisons = summary.get("comparisons", ())
    for first, second in dict.fromkeys((row["first"], row["second"]) for row in comparisons):
        found = {
            row["metric"]: f"{row['difference']:+.4f}<br><small>p = {row['p']:.3f}</small>"
            for row in comparisons
            if (row["first"], row["second"]) == (first, second)
        }
        cells = [found.get(metric, "-") for metric in metrics]
        lines.append([f"{_escape(second)} &minus; {_escape(first)}", *cells])
    head = "".join(f"<th>{html.escape(title)}</th>" for title in ("captions", *metrics))
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in lines)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _card(
    key: ImageId,
    place: int,
    evaluation: Evaluation,
    scores: Mapping[str, Scores],
    metric: str,
    picture: str,
) -> str:
    captions = "".join(
        f"<p class=caption>{_escape(evaluation.hypotheses[name][key]) or '(empty)'} "
        f"<small>{_escape(name) if len(scores) > 1 else ''} "
        f"{html.escape(metric)} {of_file.per_image[metric][place]:.3f}</small></p>"
        for name, of_file in scores.items()
    )
    references = "".join(f"<li>{_escape(text)}</li>" for text in evaluation.references[key])
    return (
        f"<figure>{picture}<figcaption><small>{_escape(str(key))}</small>{captions}"
        f"<ul>{references}</ul></figcaption></figure>"
    )


def _picture(page: Path, name: str | None, images: str | Path | None, embed: bool) -> str:
    if images is None or name is None:
        return ""
    file = Path(images) / name
    if not file.is_file():
        return f"<p class=missing>{_escape(name)} isn't in {_escape(str(images))}</p>"
    if not embed:
        address = urllib.parse.quote(os.path.relpath(file, page.parent).replace(os.sep, "/"))
        return f'<img loading=lazy src="{html.escape(address)}" alt="">'
    try:
        return f'<img src="data:image/jpeg;base64,{_thumbnail(file)}" alt="">'
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"<p class=missing>{_escape(name)}: {_escape(str(error))}</p>"


def _thumbnail(file: Path) -> str:
    with Image.open(file) as image:
        image.draft("RGB", (THUMBNAIL, THUMBNAIL))
        small = ImageOps.exif_transpose(image).convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=80)
    return base64.b64encode(content.getvalue()).decode()


def _escape(text: str) -> str:
    return html.escape(text.encode("utf-8", "backslashreplace").decode())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Caption scores</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1200px;
  padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .2em .8em; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} th {{ border-bottom: 1px solid #999 }}
code {{ font-size: 12px; overflow-wrap: anywhere }} small {{ color: #777 }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1em }}
figure {{ margin: 0; padding: .6em; border: 1px solid #ddd; border-radius: 6px }}
img {{ max-width: 100% }}
.caption {{ font-weight: 600; margin: .3em 0 }} ul {{ padding-left: 1.2em }}
.missing {{ color: #a33 }}
</style></head><body>
<h1>Caption scores</h1>
{table}
<p><code>{signature}</code></p>
<img src="data:image/png;base64,{plot}" alt="distribution of each metric over the images">
<h2>Best by {metric}</h2><div class="grid">
{best}
</div>
<h2>Worst by {metric}</h2><div class="grid">
{worst}
</div>
</body></html>
"""
