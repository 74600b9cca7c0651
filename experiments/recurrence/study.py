"""What the studies share: settings, a training loop, tables and pictures of results, the page."""

import importlib.metadata
import inspect
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captioner.config import WandbConfig
from captioner.files import atomic_write, read_json, write_json
from captioner.metrics.report import label_lines, new_figure, save_figure
from captioner.models.recurrent import RecurrentStack
from captioner.progress import log_line, progress_iter
from captioner.training.run import git_state
from captioner.training.tracking import Tracker

HERE = Path(__file__).parent
FINDINGS = HERE / "findings"  # what was seen, a paragraph a study, written by hand
Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How the studies are run.

    Attributes:
        output: Folder of the page; results and pictures go into ``results`` below it.
        quick: A trial of every part in seconds, whose numbers mean nothing.
        data: Folder of Flickr8k; "" is the one that ``captioning.toml`` names.
        weights: Weights of the CNN; "" are those that ``captioning.toml`` names.
        wandb: Mode of Weights & Biases.
    """

    output: Path
    quick: bool = False
    data: str = ""
    weights: str = ""
    wandb: str = "offline"

    @property
    def seeds(self) -> range:
        """The seeds of each run."""
        return range(1 if self.quick else 3)

    def pick(self, full: Any, quick: Any) -> Any:
        """Return the one of two sizes that is meant."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Study:
    """A study: its docstring is what it asks.

    Attributes:
        measure: Runs it, and returns a record for each run and seed.
        draw: Makes a matplotlib figure of such records.
        keys: The fields that say what was run; a row of the table for each combination.
        values: The fields that were measured, shown as mean and standard deviation over seeds.
    """

    measure: Callable[[Setting], list[Record]]
    draw: Callable[[Sequence[Record]], Any]
    keys: tuple[str, ...]
    values: tuple[str, ...]


# --- training -----------------------------------------------------------------------------------


class LastStep(nn.Module):
    """Reads a sequence, answers at its end (many-to-one).

    Args:
        outputs: How many numbers.
        stack: What reads; it returns its last h alone.
    """

    def __init__(self, outputs: int, stack: RecurrentStack) -> None:
        super().__init__()
        self.stack, self.output = stack, nn.Linear(stack.fused.hidden_size, outputs)

    def forward(self, x: Tensor, lengths: Tensor | None = None, bptt_window: int = 0) -> Tensor:
        """Read (rows, T, D), answer (rows, outputs)."""
        return self.output(self.stack(x, None, lengths, bptt_window))


@dataclass
class History:
    """Loss and norm of the gradient (before it is clipped) at each step of a training.

    A norm may be infinite: what clipping makes of that shows in the loss of the next step.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether it ended in a loss that is no number."""
        return not math.isfinite(self.losses[-1])


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    optimizer: torch.optim.Optimizer,
    clip: float = 1.0,
    clip_value: float = 0.0,
    done: Callable[[History], bool] | None = None,
) -> History:
    """Train until the steps are over, the loss isn't finite, or ``done`` says so.

    Args:
        model: What is trained.
        loss_of: Returns the loss of a step's batch.
        steps: At most.
        optimizer: Of the model's parameters.
        clip: Largest norm of the gradient; 0 doesn't clip.
        clip_value: Largest size of each number in it; 0 doesn't clip.
        done: Asked after each step.
    """
    history = History()
    model.train()
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        history.losses.append(loss.item())
        history.norms.append(nn.utils.get_total_norm(gradients).item())
        if history.diverged or (done and done(history)):
            break
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if clip_value:
            nn.utils.clip_grad_value_(model.parameters(), clip_value)
        optimizer.step()
    model.eval()
    return history


def train_models(
    name: str,
    setting: Setting,
    models: dict[str, Callable[[], nn.Module]],
    loss_of: Callable[[nn.Module, np.random.Generator], Tensor],
    scores_of: Callable[[nn.Module], Record],
    steps: int,
    rate: float = 2e-3,
) -> list[Record]:
    """Train each kind of model with each seed under the same budget, and score it.

    Args:
        name: Of the study.
        setting: How studies are run.
        models: Makes a model, by its name.
        loss_of: Returns a model's loss on a batch that it draws.
        scores_of: Returns what is measured of a model that was trained.
        steps: Of Adam.
        rate: Its learning rate.
    """
    records: list[Record] = []
    combinations = list(product(models, setting.seeds))
    for kind, seed in progress_iter(combinations, name, len(combinations), "run"):
        torch.manual_seed(seed)
        random = np.random.default_rng(seed)
        model = models[kind]()
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        fit(model, lambda _, m=model, r=random: loss_of(m, r), steps, optimizer)  # type: ignore[misc]
        with torch.no_grad():
            scores = scores_of(model)
        weights = sum(parameter.numel() for parameter in model.parameters())
        records.append({"model": kind, "seed": seed, "parameters": weights, **scores})
    return records


def batch_of(rows: int, random: np.random.Generator, size: int) -> np.ndarray:
    """Draw which examples are in a batch."""
    return random.integers(rows, size=size)


# --- tables and pictures ------------------------------------------------------------------------

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


def table(records: Sequence[Record], keys: Sequence[str], values: Sequence[str]) -> str:
    """Return records as a Markdown table: mean, and ± standard deviation over seeds."""
    rows = [[*(name.replace("_", " ") for name in (*keys, *values)), "runs"]]
    rows.append(["---"] * len(rows[0]))
    for key, of_key in groups(records, keys).items():
        cells = [_cell([record.get(name) for record in of_key]) for name in values]
        rows.append([*(f"{part:g}" if isinstance(part, float) else str(part) for part in key)])
        rows[-1] += [*cells, str(len(of_key))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(values: Sequence[Any]) -> str:
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return "-"
    text = _number(statistics.fmean(numbers))
    if len(numbers) > 1 and max(numbers) > min(numbers):
        text += f" ± {_number(statistics.stdev(numbers))}"
    return text


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def draw_lines(
    axes: Any, records: Sequence[Record], x: str, y: str, by: Sequence[str], **style: Any
) -> None:
    """Draw y over x (log), a line for each group: mean over seeds in a band of the extremes.

    The scale of y must be set before: the lines are labelled at their ends.
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
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    # Room for the labels.
    width = places[-1] / places[0] if len(places) > 1 else 2.0
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
        axes.text(1.02, place, _number(middle), va="center", transform=axes.get_yaxis_transform())
        if not low <= middle <= high:
            end, side = (0.0, "left") if middle < low else (1.0, "right")
            text = "◀ beyond the axis" if end == 0 else "beyond the axis ▶"
            style = {"ha": side, "va": "center", "color": colour, "fontsize": "small"}
            axes.text(end, place, text, transform=axes.get_yaxis_transform(), **style)
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
    figure = new_figure(len(labels), 1, 5.2, 1.0 + 0.3 * rows)
    for place, (name, label) in enumerate(labels.items()):
        axes = figure.add_subplot(1, len(labels), place + 1)
        draw_dots(axes, records, "model", name, label)
    return figure


# --- running ------------------------------------------------------------------------------------


def run(name: str, study: Study, setting: Setting) -> None:
    """Run a study; write its numbers and its picture, and log them to Weights & Biases.

    They are logged when the study is over: the trainings of a study have runs of their own.
    """
    log_line(f"{name}{' (quick)' if setting.quick else ''}")
    started = time.monotonic()
    records = study.measure(setting)
    seconds = time.monotonic() - started
    folder = setting.output / "results"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / f"{name}.json",
        {
            "quick": setting.quick,
            "seconds": round(seconds, 1),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": importlib.metadata.version("torch"),
            "git": git_state(),
            "records": records,
        },
        indent=None,
    )
    figure = study.draw(records)
    save_figure(folder / f"{name}.svg", figure)
    config = WandbConfig(
        mode=setting.wandb,  # type: ignore[arg-type]
        project="captioner-recurrence",
        name=name,
        tags=("quick",) if setting.quick else (),
    )
    tracker = Tracker(config, {"study": name, "quick": setting.quick}, setting.output)
    failed = True
    try:
        for step, record in enumerate(records):
            numbers = {k: v for k, v in record.items() if not isinstance(v, (list, dict))}
            tracker.log(step, {f"{name}/{key}": value for key, value in numbers.items()})
        with TemporaryDirectory() as images:  # Weights & Biases takes no SVG
            save_figure(Path(images) / f"{name}.png", figure)
            tracker.log_images(len(records), {name: Path(images) / f"{name}.png"})
        failed = False
    finally:
        tracker.finish(failed)
    for line in table(records, study.keys, study.values).splitlines():
        log_line(line)
    log_line(f"{name}: {seconds:.0f} s")


def write_page(studies: Mapping[str, Study], setting: Setting) -> None:
    """Write README.md in the output folder of all results that are there, and draw their pictures.

    What a study asks is its docstring; what was seen is ``findings/NAME.md``, so that a page that
    is written again keeps it.
    """
    parts = [inspect.cleandoc(_INTRODUCTION)]
    for name, study in studies.items():
        path = setting.output / "results" / f"{name}.json"
        if not path.exists():
            continue
        content = read_json(path)
        records = content["records"]
        save_figure(path.with_suffix(".svg"), study.draw(records))
        title, _, asked = inspect.cleandoc(study.measure.__doc__ or name).partition("\n")
        parts.append(f"## {title.rstrip('.')}\n\n{asked.strip()}")
        seen = FINDINGS / f"{name}.md"
        if seen.exists():
            parts.append(f"**Seen.** {seen.read_text(encoding='utf-8').strip()}")
        parts.append(f"![{name}](results/{name}.svg)\n\n{table(records, study.keys, study.values)}")
        trial = "a quick trial, whose numbers mean nothing; " if content["quick"] else ""
        parts.append(
            f"`python -m experiments.recurrence {name}`: {trial}{content['seconds']:.0f} s with "
            f"{content['threads']} threads, torch {content['torch']}."
        )
    with atomic_write(setting.output / "README.md") as file:
        file.write("\n\n".join(parts) + "\n")


_INTRODUCTION = """
    # Recurrence: RNN, GRU and LSTM, what each can and cannot do

    Each study is one command, from the project's folder: `python -m experiments.recurrence NAME`,
    or `all`; `--quick` tries every part in seconds. They use `RecurrentStack` and the decoders of
    [captioner](../../captioner/models/recurrent.py), real captions and photographs of Flickr8k, and
    generated sequences. Numbers are means ± standard deviations over seeds; bands in the pictures
    are the extremes, dots single seeds. This page is assembled from `results/` and `findings/`.
    """
