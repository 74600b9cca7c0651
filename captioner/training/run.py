"""A training run, from an experiment's config to a checkpoint; read it downwards from ``train``.

A run's folder:

    best/, last/       checkpoints; ``last`` also holds what resuming needs
    log.jsonl          a line per log step, per epoch and per measurement of gradient flow
    training.png       loss, validation scores, rate and learning rate, drawn at each epoch's end
    run.json           config, package versions, git commit, hardware, command; for a run that began
                       with a checkpoint (training.init_from), its path and SHA-256
    split.json         image ids of train and val
    wandb/             what Weights & Biases keeps
"""

import contextlib
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from captioner.config import Config
from captioner.data.annotations import read_content
from captioner.data.dataset import CaptionDataset, check_no_overlap
from captioner.device import arithmetic, choose_precision, memory_errors
from captioner.errors import CheckpointError, ConfigError
from captioner.files import locked, read_json, write_json
from captioner.models.captioning_model import check_decoder_kind
from captioner.stopping import StopSignals
from captioner.training.distributed import ALONE, Processes
from captioner.training.initial_model import (
    check_something_is_learnt,
    make_model,
    origin_record,
)
from captioner.training.inputs import prepare_inputs
from captioner.training.resume import (
    Circumstances,
    load_training_state,
    name_of_device,
    nothing_to_resume,
)
from captioner.training.tracking import choose_mode
from captioner.training.trainer import Trainer

LOST_PROCESSES_SECONDS = 60.0
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "nltk", "wandb", "pycocotools")


def train(
    config: Config,
    output_dir: str | Path,
    resume: bool = False,
    or_start: bool = False,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Train a captioner.

    Args:
        config: The experiment.
        output_dir: Folder of the run.
        resume: Continue the run in ``output_dir``, from its last checkpoint; the result is that
            of a run that was never interrupted.
        or_start: Where there is no run to resume, start one.
        processes: They all call this, and see the same folder; the first one writes there.

    Returns:
        The validation scores of the best checkpoint.

    Raises:
        CaptionerError: Anything that a user can mend; most before training starts.
        Stopped: By Ctrl-C or SIGTERM. What was trained is kept: see ``StopSignals``.
    """
    with StopSignals(processes.count == 1) as stop_signals:
        return train_watched(config, output_dir, stop_signals, resume, or_start, processes)


def train_watched(
    config: Config,
    output_dir: str | Path,
    stop_signals: StopSignals,
    resume: bool = False,
    or_start: bool = False,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Do what ``train`` does, with signals that are watched for already."""
    output_dir = Path(output_dir)
    with processes.together():
        check_settings(config, processes)
    saved = None
    with alone_in(output_dir, resume and not or_start, processes):
        for turn in (True, False):  # the first one tidies up before the others read
            with processes.together():
                if processes.is_first == turn:
                    saved = load_training_state(output_dir, config, resume, or_start)
        device = processes.device(config.training.device)
        precision = choose_precision(config.training.precision, device)
        with arithmetic(device, precision, config.training.deterministic):
            return _train(config, output_dir, saved, stop_signals, processes, device, precision)


def check_settings(config: Config, processes: Processes = ALONE) -> None:
    """Refuse settings that can't be trained with here, before anything is read or written."""
    check_decoder_kind(config.decoder.kind)
    choose_mode(config.wandb)
    choose_precision(config.training.precision, processes.device(config.training.device))


@contextlib.contextmanager
def alone_in(output_dir: Path, must_exist: bool, processes: Processes = ALONE) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made unless it must be there already.

    Of several processes the first one holds it for all.

    Raises:
        CheckpointError: It must be there, and isn't.
        ConfigError: Another run holds the lock.
    """
    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.is_first:
                if must_exist and not output_dir.is_dir():
                    raise nothing_to_resume(output_dir)
                output_dir.mkdir(parents=True, exist_ok=True)
                busy = ConfigError(
                    f"{output_dir}: another process is training in this folder; wait for it, or "
                    "take another --output-dir"
                )
                # Processes that torchrun has lost sight of take some time to notice it.
                seconds = LOST_PROCESSES_SECONDS if processes.count > 1 else 0.0
                held.enter_context(locked(output_dir / ".lock", busy, seconds))
        yield


def _train(
    config: Config,
    output_dir: Path,
    saved: dict[str, Any] | None,
    stop_signals: StopSignals,
    processes: Processes,
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, float]:
    """Train, alone in the run's folder; ``saved`` is what ``load_training_state`` gave."""
    with processes.together():
        if not saved:
            check_something_is_learnt(config)
        torch.manual_seed(config.training.seed)
        train_set, val_set = load_splits(config)
        model = make_model(config, train_set, output_dir if saved else None).to(device)
    with memory_errors(lambda: f"encoding images with {config.encoder.name} on {device}"):
        train_set, train_inputs = prepare_inputs(
            model, train_set, config, device, precision, True, processes
        )
        val_set, val_inputs = prepare_inputs(
            model, val_set, config, device, precision, False, processes
        )
    with processes.together():
        circumstances = Circumstances.of_run(train_set, val_set, precision, device, processes.count)
        if saved:
            circumstances.check_same(Circumstances(**saved["circumstances"]), output_dir)
        if processes.is_first:
            save_run_record(config, output_dir, device, precision, train_set, val_set)
        trainer = Trainer(
            config, output_dir, model, device, precision, circumstances, saved, processes
        )
    with trainer:
        stop_signals.deferred = True
        return trainer.fit(train_set, train_inputs, val_set, val_inputs, stop_signals)


def load_splits(config: Config) -> tuple[CaptionDataset, CaptionDataset]:
    """Read the images and captions of train and val."""
    data = config.data
    files = {split: data.path(f"{split}_annotations") for split in ("train", "val")}
    content = read_content(files["train"]) if files["train"] == files["val"] else None
    train_set, val_set = (
        CaptionDataset.load(
            files[split],
            data.path(f"{split}_images"),
            data.split(f"{split}_split"),
            data.bad_images,
            content,
        )
        for split in files
    )
    check_no_overlap(train_set, val_set)
    if config.validation.max_images:
        val_set = val_set.select(range(min(len(val_set), config.validation.max_images)))
    return train_set, val_set


def save_run_record(
    config: Config,
    output_dir: Path,
    device: torch.device,
    precision: torch.dtype,
    train_set: CaptionDataset,
    val_set: CaptionDataset,
) -> None:
    """Save what is needed to reproduce the run; a resumed run keeps a record of each session."""
    path = output_dir / "run.json"
    record = read_json(path, CheckpointError) if path.exists() else {}
    sessions = record.get("sessions", [])
    init_from = record["init_from"] if "init_from" in record else origin_record(config)
    sessions.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "git": git_state(),
            "device": name_of_device(device),
            "threads": torch.get_num_threads(),
            "precision": str(precision).removeprefix("torch."),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
    )
    write_json(path, {"config": config.to_dict(), "init_from": init_from, "sessions": sessions})
    write_json(
        output_dir / "split.json",
        {"train": train_set.image_ids, "val": val_set.image_ids},
        indent=None,
    )


def git_state() -> dict[str, Any] | None:
    """Return commit and uncommitted changes of the code, or None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
            ).stdout.rstrip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed_files": status.splitlines()}
