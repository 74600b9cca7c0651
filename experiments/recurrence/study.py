"""What the studies share: settings, a training loop, tables of results, the page."""

import importlib.metadata
import inspect
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
from captioner.metrics.report import save_figure
from captioner.models.recurrent import RecurrentStack
from captioner.progress import log_line, progress_iter
from captioner.training.run import git_state
from captioner.training.tracking import Tracker
from experiments.recurrence.pictures import Record, format_number, groups

HERE = Path(__file__).parent
FINDINGS = HERE / "findings"  # what was seen, a paragraph a study, written by hand
MOST_ROWS = 12  # of a table that is shown unfolded


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
    def error(self) -> float | None:
        """Mean loss of the last 20 steps; None if it diverged."""
        return None if self.diverged else statistics.fmean(self.losses[-20:])

    def is_below(self, limit: float) -> bool:
        """Tell whether the mean loss of the last 20 steps is."""
        return len(self.losses) >= 20 and statistics.fmean(self.losses[-20:]) < limit

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
        started = time.perf_counter()
        fit(model, lambda _, m=model, r=random: loss_of(m, r), steps, optimizer)  # type: ignore[misc]
        record: Record = {"model": kind, "seed": seed, "seconds": time.perf_counter() - started}
        record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        with torch.no_grad():
            records.append(record | scores_of(model))
    return records


def batch_of(rows: int, random: np.random.Generator, size: int) -> np.ndarray:
    """Draw which examples are in a batch."""
    return random.integers(rows, size=size)


# --- tables --------------------------------------------------------------------------------------


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
    if any(isinstance(value, str) for value in values):
        return ", ".join(value for value in values if value is not None)
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return "-"
    text = format_number(statistics.fmean(numbers))
    if len(numbers) > 1 and max(numbers) > min(numbers):
        text += f" ± {format_number(statistics.stdev(numbers))}"
    return text


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
    _log(name, setting, records, figure)
    for line in table(records, study.keys, study.values).splitlines():
        log_line(line)
    log_line(f"{name}: {seconds:.0f} s")


def _log(name: str, setting: Setting, records: Sequence[Record], figure: Any) -> None:
    """Log a study to Weights & Biases, as a run of its own."""
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


def write_page(studies: Mapping[str, Study], setting: Setting, course: str = "") -> None:
    """Write README.md in the output folder of all results that are there, and draw their pictures.

    What a study asks is its docstring; what was seen is ``findings/NAME.md``, so that a page that
    is written again keeps it.

    Args:
        studies: By name.
        setting: How they are run.
        course: What comes before them.
    """
    parts = [inspect.cleandoc(_INTRODUCTION), *([course, "# The studies"] if course else ())]
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
        parts.append(f"![{name}](results/{name}.svg)")
        parts.append(_folded(table(records, study.keys, study.values)))
        trial = "a quick trial, whose numbers mean nothing; " if content["quick"] else ""
        parts.append(
            f"`python -m experiments.recurrence {name}`: {trial}{content['seconds']:.0f} s with "
            f"{content['threads']} threads, torch {content['torch']}."
        )
    with atomic_write(setting.output / "README.md") as file:
        file.write("\n\n".join(parts) + "\n")


def _folded(text: str) -> str:
    """Return a table as it is, or a long one so that it opens at a click."""
    rows = text.count("\n") - 1
    if rows <= MOST_ROWS:
        return text
    return f"<details><summary>All {rows} rows</summary>\n\n{text}\n\n</details>"


_INTRODUCTION = """
    # Recurrence: RNN, GRU and LSTM, what each can and cannot do

    Each study is one command, from the project's folder: `python -m experiments.recurrence NAME`,
    or `all`; `--quick` tries every part in seconds. They use `RecurrentStack` and the decoders of
    [captioner](../../captioner/models/recurrent.py), real captions and photographs of Flickr8k, and
    generated sequences. Numbers are means ± standard deviations over seeds; bands in the pictures
    are the extremes, dots single seeds. This page is assembled from `results/` and `findings/`.
    """
