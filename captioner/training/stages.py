"""The stages of an experiment, one run after the other; read it downwards from ``train_stages``.

The folder of an experiment with stages:

    NAME/              the run of each stage (see ``run``); in it, written last, finished.json
    best/              the best checkpoint of the last stage that is finished, a copy
    stages.json        what each finished stage has reached: the content of its finished.json
"""

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.checksums import CHECKSUMS_FILE
from captioner.config import Config
from captioner.errors import CaptionerError, CheckpointError, ConfigError
from captioner.experiment_file import Stage, parse
from captioner.files import atomic_directory, read_json, recover_directory, write_json
from captioner.models.checkpoint import WEIGHTS_FILE
from captioner.models.encoder import make_encoder
from captioner.progress import log_line
from captioner.stopping import StopSignals
from captioner.training.distributed import ALONE, Processes
from captioner.training.initial_model import (
    check_fits,
    check_something_is_learnt,
    origin_record,
    settings_of_weights,
)
from captioner.training.resume import check_same_settings, nothing_to_resume, run_is_there
from captioner.training.run import alone_in, check_settings, train_watched
from captioner.training.tracking import read_log

FINISHED_FILE, STAGES_FILE = "finished.json", "stages.json"


@dataclass(frozen=True)
class _Run:
    """A stage in its folder.

    Attributes:
        stage: What the experiment file asks for.
        folder: Where it is trained.
        config: Its settings, with the checkpoint that it begins with.
        previous: The run whose best checkpoint that is, for a stage that follows another.
    """

    stage: Stage
    folder: Path
    config: Config
    previous: "_Run | None"

    @property
    def is_finished(self) -> bool:
        """Whether it has ended: the mark of that is the last that is written."""
        return (self.folder / FINISHED_FILE).exists()

    @property
    def is_begun(self) -> bool:
        """Whether there is something to resume, or to skip."""
        return has_run(self.folder)


def has_run(folder: Path) -> bool:
    """Tell whether a folder holds a run that was trained for some time, or that has ended."""
    return (folder / "last").exists() or (folder / FINISHED_FILE).exists()


def train_stages(
    stages: Sequence[Stage],
    output_dir: str | Path,
    resume: bool = False,
    or_start: bool = False,
    only: Collection[str] = (),
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Train the stages of an experiment, each from the best checkpoint of the one before.

    Args:
        stages: All of them, as ``load_stages`` returns them.
        output_dir: Folder of the experiment.
        resume: Skip the stages that are finished, and continue the one that was interrupted; the
            result is that of an experiment that was never interrupted.
        or_start: Where there is no run to resume, start one.
        only: Names of those to train; none: all. What they begin with must be there.
        processes: As for ``run.train``.

    Returns:
        What each stage that is finished by now has reached, as in ``stages.json``.

    Raises:
        CaptionerError: Anything that a user can mend; most before the first stage starts.
        Stopped: By Ctrl-C or SIGTERM. What was trained is kept: see ``StopSignals``.
    """
    output_dir = Path(output_dir)
    runs = _place(stages, output_dir)
    chosen = [run for run in runs if not only or run.stage.name in only]
    with processes.together():
        _check_settings(chosen, processes)
    alone = alone_in(output_dir, resume and not or_start, processes)
    with StopSignals(processes.count == 1) as stop_signals, alone:
        with processes.together():
            if processes.is_first:
                _recover_folders(runs)
        with processes.together():
            _check_folders(output_dir, chosen, resume, or_start)
        for run in chosen:
            with processes.together():
                stop_signals.deferred = False
                stop_signals.raise_if_received()  # it may have come when the one before was over
            _train_stage(run, resume, stop_signals, processes)
            _publish(output_dir, runs, processes)
    return [_read_finished(run) for run in runs if run.is_finished]


def _place(stages: Sequence[Stage], output_dir: Path) -> list[_Run]:
    """Give each stage its folder, what it begins with, and its name in W&B."""
    title = output_dir.resolve().name
    runs: list[_Run] = []
    for stage in stages:
        config, folder = stage.config, output_dir / stage.name
        previous = runs[-1] if stage.follows else None
        tracking = dataclasses.replace(
            config.wandb,
            group=config.wandb.group or title,
            name=f"{config.wandb.name or title}/{stage.name}",
        )
        training = config.training
        if previous:
            training = dataclasses.replace(training, init_from=str(previous.folder / "best"))
        config = dataclasses.replace(config, training=training, wandb=tracking)
        runs.append(_Run(stage, folder, config, previous))
    return runs


def _check_settings(chosen: Sequence[_Run], processes: Processes) -> None:
    """Find what is wrong with a later stage before the first one takes its hours.

    What is wrong with the data or the CNN of the first shows as soon as it starts.
    """
    for run in chosen:
        with _naming(run.stage):
            check_settings(run.config, processes)
    for before, run in itertools.pairwise(chosen):
        with _naming(run.stage):
            _check_paths(run)
            if run.previous:
                source = f"the checkpoint of '{run.previous.stage.name}' that it begins with"
                wanted = settings_of_weights(run.config)
                check_fits(settings_of_weights(run.previous.config), wanted, source)
            else:
                check_something_is_learnt(run.config)
            if _cnn_of(run.config) != _cnn_of(before.config):
                _check_cnn(run.config)


def _check_paths(run: _Run) -> None:
    for name in ("train_annotations", "train_images", "val_annotations", "val_images"):
        path = run.config.data.path(name)
        if not path.exists():
            raise ConfigError(f"data.{name}: {path}: no such file or folder")
    init_from = Path(run.config.training.init_from).expanduser()
    is_made_here = run.folder.parent.resolve() in init_from.resolve().parents
    if not (is_made_here or run.is_begun or init_from.is_dir()):
        raise CheckpointError(f"training.init_from={init_from}: no such checkpoint directory")


def _cnn_of(config: Config) -> tuple[object, ...]:
    return config.encoder, config.preprocessing, config.training.init_from == ""


def _check_cnn(config: Config) -> None:
    """Build the CNN; where it begins with a checkpoint, its weights come from there."""
    weights = "none" if config.training.init_from else config.encoder.weights
    cnn = config.encoder
    make_encoder(cnn.name, weights, config.preprocessing, cnn.last_stage).fine_tune_from(
        cnn.fine_tune_from
    )


@contextlib.contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """Have errors name the file and the stage."""
    try:
        yield
    except CaptionerError as error:
        raise type(error)(f"{stage.source}: {error}") from None


def _recover_folders(runs: Sequence[_Run]) -> None:
    for run in runs:
        for name in ("last", "best"):
            recover_directory(run.folder / name)


def _check_folders(output_dir: Path, chosen: Sequence[_Run], resume: bool, or_start: bool) -> None:
    """Refuse to start where runs are, or without what to begin with; to resume where none is."""
    if (output_dir / "run.json").exists():
        raise ConfigError(
            f"{output_dir}: a run of an experiment without stages is there; take another "
            "--output-dir"
        )
    for run in chosen:
        if not resume and (run.is_begun or (run.folder / "best").exists()):
            raise run_is_there(run.folder)
        previous = run.previous
        if previous and not run.is_begun and (previous.is_finished or previous not in chosen):
            best = previous.folder / "best"
            if not (best / WEIGHTS_FILE).exists():
                raise CheckpointError(
                    f"{best}: no such checkpoint; stage '{run.stage.name}' begins with it: train "
                    f"'{previous.stage.name}' first, or set {run.stage.name}.training.init_from"
                )
    if resume and not or_start and not any(run.is_begun for run in chosen):
        raise nothing_to_resume(chosen[0].folder)


def _train_stage(run: _Run, resume: bool, stop_signals: StopSignals, processes: Processes) -> None:
    """Train a stage to its end, unless it has ended."""
    with processes.together():
        run, is_finished = _begin_stage(run)
    if is_finished:
        return
    scores = train_watched(run.config, run.folder, stop_signals, resume, resume, processes)
    with processes.together():
        if processes.is_first:
            write_json(run.folder / FINISHED_FILE, _summarise(run, scores))


def _begin_stage(run: _Run) -> tuple[_Run, bool]:
    """Return a stage as it is to be trained, and whether it is finished already."""
    if run.previous and run.is_begun:
        run = _check_origin(run, run.previous.folder / "best")
    elif run.previous and not run.previous.is_finished:
        log_line(f"warning: {run.previous.folder} isn't finished: its best checkpoint may change")
    if run.is_finished:
        saved = parse(Config, _read_record(run)["config"], str(run.folder / "run.json"))
        check_same_settings(saved.to_dict(), run.config.to_dict(), run.folder)
        log_line(f"stage {run.stage.name}: finished already")
        return run, True
    origin = f", from {run.config.training.init_from}" if run.config.training.init_from else ""
    log_line(f"stage {run.stage.name}{origin}")
    return run, False


def _check_origin(run: _Run, best: Path) -> _Run:
    """Check that a stage has begun with the checkpoint that is the best one before it now.

    Nothing is checked where that was removed: a stage that has begun needs it no more.

    Returns:
        The run, which calls the checkpoint as it did when it began: the folder may have been moved.

    Raises:
        CheckpointError: It has begun with another one.
    """
    record = _read_record(run)
    if (best / WEIGHTS_FILE).exists():
        origin, now = record["init_from"], origin_record(run.config)
        if not origin or not now or origin["sha256"] != now["sha256"]:
            raise CheckpointError(
                f"{run.folder}: this stage began with another checkpoint than {best} is now; "
                f"remove {run.folder} to train it anew"
            )
    init_from = record["config"]["training"]["init_from"]
    training = dataclasses.replace(run.config.training, init_from=init_from)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, training=training))


def _read_record(run: _Run) -> dict[str, Any]:
    path = run.folder / "run.json"
    record: dict[str, Any] = read_json(path, CheckpointError)
    if not isinstance(record, dict) or not {"config", "init_from", "sessions"} <= record.keys():
        raise CheckpointError(f"{path}: not the record of a run; copy the run again")
    return record


def _summarise(run: _Run, scores: dict[str, float]) -> dict[str, Any]:
    """Return what a run has reached, and the seconds of training and validation that it took."""
    record = _read_record(run)
    best = read_json(run.folder / "best" / "config.json", CheckpointError)
    rows = read_log(run.folder / "log.jsonl")
    seconds = [
        row.get(name, 0.0) for row in rows for name in ("train_seconds", "validation_seconds")
    ]
    return {
        "name": run.stage.name,
        "scores": scores,
        "epochs": sum(row["kind"] == "epoch" for row in rows),
        "best_epoch": best["scores"]["epoch"],
        "seconds": round(sum(seconds), 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": record["sessions"][-1]["git"],
        "init_from": record["init_from"],
    }


def _read_finished(run: _Run) -> dict[str, Any]:
    content: dict[str, Any] = read_json(run.folder / FINISHED_FILE, CheckpointError)
    return content


def _publish(output_dir: Path, runs: Sequence[_Run], processes: Processes) -> None:
    """Bring up to date what the experiment's folder shows of the stages that are finished.

    Whoever is killed here does it again when resumed.
    """
    with processes.together():
        if processes.is_first:
            _publish_finished(output_dir, runs)


def _publish_finished(output_dir: Path, runs: Sequence[_Run]) -> None:
    finished = [run for run in runs if run.is_finished]
    write_json(output_dir / STAGES_FILE, [_read_finished(run) for run in finished])
    source, target = finished[-1].folder / "best", output_dir / "best"
    if source.is_dir() and _checksums(source) != _checksums(target):
        with atomic_directory(target) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)


def _checksums(checkpoint: Path) -> bytes:
    path = checkpoint / CHECKSUMS_FILE
    return path.read_bytes() if path.exists() else b""
