"""What the folders of runs tell of them, also while they run: how far, how good, how fast.

Everything is read from the files of a run (see ``run``), and nothing is written. A run may be going
on, may have died while it wrote, or be no run at all: what can't be read is left out, or said.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

from captioner.errors import DataError
from captioner.files import is_locked, open_regular, read_json

RECENT_STEPS = 20  # log lines that the rate is the median of
NO_RUNS_INSIDE = {"best", "last", "wandb"}


@dataclass(frozen=True)
class RunOverview:
    """A run at a moment.

    Attributes:
        folder: Where it is.
        state: "running", "finished" or "stopped", and where; or what is wrong with its files.
        scores: Of its best checkpoint, each metric's; empty where there is none.
        best_epoch: The epoch that checkpoint is of; None where there is none.
        epochs_done, epochs: Finished, and in all.
        images_per_second: In training, lately; None before the first step.
        seconds_left: Until the last epoch's end, while it runs and that is known.
    """

    folder: Path
    state: str
    scores: Mapping[str, float] = field(default_factory=dict)
    best_epoch: int | None = None
    epochs_done: int = 0
    epochs: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None


def find_runs(folder: Path) -> list[Path]:
    """Return the folders with a ``run.json``, at any depth, in the order of their names.

    Raises:
        DataError: There is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    runs = []
    for path, folders, files in os.walk(folder):
        if "run.json" in files:
            runs.append(Path(path))
            folders[:] = [name for name in folders if name not in NO_RUNS_INSIDE]
        folders.sort()
    return sorted(runs)


def describe_run(folder: Path, now: float) -> RunOverview:
    """Read what a run's files tell.

    Args:
        folder: The run's.
        now: Seconds since 1970.

    Returns:
        Its overview; where the files are damaged, one whose ``state`` says so.
    """
    running = is_locked(folder / ".lock")  # first: a run that ends now has written all by then
    try:
        config = _part(read_json(folder / "run.json", regular=True), "config")
    except DataError as error:
        return RunOverview(folder, str(error))
    training = _part(config, "training")
    epochs, patience = training.get("epochs"), training.get("patience", 0)
    if not (_is_number(epochs) and _is_number(patience)):
        return RunOverview(folder, f"{folder / 'run.json'}: not the record of a run of captioner")
    log = _read_log(folder / "log.jsonl")
    best, last = (_scores_of(folder / name) for name in ("best", "last"))
    done = int(last.get("epoch", 0))
    best_epoch = int(best["epoch"]) if "epoch" in best else None
    impatient = bool(patience) and done - (best_epoch or 0) >= patience
    finished = not running and (done >= epochs or impatient or (folder / "finished.json").exists())
    rates = [row["images_per_second"] for row in log.steps if "images_per_second" in row]
    rate = median(rates[-RECENT_STEPS:]) if rates else None
    images = _images_in_epoch(folder) if running else 0
    images_in_step = _number(training, "batch_size") * _number(training, "accumulation_steps")
    return RunOverview(
        folder,
        _state(log, last, running, finished, now),
        {name: score for name, score in best.items() if name not in ("epoch", "step")},
        best_epoch,
        done,
        int(epochs),
        rate,
        _seconds_left(log, int(epochs), images, images_in_step, rate) if running else None,
    )


# --- the files --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Log:
    """The rows of log.jsonl: of steps, of epochs; and when it was last written."""

    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    written: float

    @property
    def last_row(self) -> dict[str, Any] | None:
        return max([*self.steps[-1:], *self.epochs[-1:]], key=lambda row: row["step"], default=None)


def _read_log(path: Path) -> _Log:
    """Read a log without the lines that are damaged or only half written yet."""
    rows: dict[str, list[dict[str, Any]]] = {"step": [], "epoch": []}
    written = 0.0
    try:
        with open_regular(path) as file:
            written = os.fstat(file.fileno()).st_mtime
            for line in file:
                row = _parse(line)
                if row and row.get("kind") in rows:
                    rows[row["kind"]].append(row)
    except OSError:
        pass  # it hasn't begun yet
    return _Log(rows["step"], rows["epoch"], written)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the kind and the numbers of a line, step and epoch among them; None if it lacks."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    row = {name: value for name, value in row.items() if name == "kind" or _is_number(value)}
    return row if {"step", "epoch"} <= row.keys() and isinstance(row.get("kind"), str) else None


def _scores_of(checkpoint: Path) -> dict[str, float]:
    """Return the numbers that a checkpoint gives as its scores, epoch and step among them."""
    try:
        scores = _part(read_json(checkpoint / "config.json", regular=True), "scores")
    except DataError:
        return {}
    return {name: value for name, value in scores.items() if _is_number(value)}


def _part(content: Any, name: str) -> dict[str, Any]:
    part = content.get(name) if isinstance(content, dict) else None
    return part if isinstance(part, dict) else {}


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    return value if _is_number(value) else 1.0


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _images_in_epoch(folder: Path) -> int:
    """Return how many images an epoch of training has; 0 where that can't be read."""
    try:
        split = read_json(folder / "split.json", regular=True)
    except DataError:
        return 0
    train = split.get("train") if isinstance(split, dict) else None
    return len(train) if isinstance(train, list) else 0


# --- what they mean ---------------------------------------------------------------------------


def _state(log: _Log, last: Mapping[str, float], running: bool, finished: bool, now: float) -> str:
    """Say whether a run is going on, has ended, or where it was when it stopped."""
    when = f"{duration(now - log.written)} ago"
    row = log.last_row
    if finished:
        return f"finished {when}"
    if running and not row:
        return "running: before its first step"
    if running and row:
        if row["kind"] == "epoch":
            return f"running: epoch {row['epoch']} is over, last line {when}"
        return f"running: epoch {row['epoch']}, step {row['step']:,}, last line {when}"
    if not row and "step" not in last:
        return "stopped before its first step"
    place = f"stopped in epoch {row['epoch']}, step {row['step']:,}, {when}" if row else "stopped"
    if row and row["kind"] == "epoch":
        place = f"stopped after epoch {row['epoch']}, step {row['step']:,}, {when}"
    if "step" not in last:
        return f"{place}; no checkpoint to go on from"
    return f"{place}; --resume goes on from step {int(last['step']):,}"


def _seconds_left(
    log: _Log, epochs: int, images: int, images_in_step: float, rate: float | None
) -> float | None:
    """Return how long a run still takes at the pace of its last epoch, or of its last steps."""
    if log.epochs:
        last = log.epochs[-1]
        before = log.epochs[-2]["step"] if len(log.epochs) > 1 else 0
        steps = last["step"] - before
        seconds = last.get("train_seconds", 0) + last.get("validation_seconds", 0)
        since = log.steps[-1]["step"] - last["step"] if log.steps else 0
        share = min(1.0, max(0, since) / steps) if steps > 0 else 0.0
        return max(0.0, epochs - last["epoch"] - share) * seconds
    if not (images and rate and log.steps):
        return None
    return max(0.0, epochs * images - log.steps[-1]["step"] * images_in_step) / rate


def duration(seconds: float) -> str:
    """Return a time in the two units that tell most: ``"45 s"``, ``"3 min"``, ``"2 h 5 min"``."""
    seconds = max(0.0, seconds)  # a clock that was set back
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"
