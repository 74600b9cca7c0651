"""A training run, from an experiment's config to a checkpoint; read it downwards from ``train``.

A run's folder:

    best/, last/       checkpoints; ``last`` also holds what resuming needs
    log.jsonl          a line per log step, per epoch and per measurement of gradient flow
    run.json           config, package versions, git commit, hardware, command
    split.json         image ids of train and val
    wandb/             what Weights & Biases keeps
"""

import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from captioner.config import Config
from captioner.data.dataset import CaptionDataset, check_no_overlap
from captioner.data.vocabulary import Vocabulary
from captioner.device import choose_device, choose_precision
from captioner.errors import CheckpointError, ConfigError
from captioner.files import locked, read_json, write_json
from captioner.models.captioning_model import CaptioningModel, check_decoder_kind
from captioner.models.checkpoint import load_checkpoint
from captioner.models.encoder import make_encoder
from captioner.progress import log_line
from captioner.training.inputs import prepare_inputs
from captioner.training.resume import Circumstances, load_training_state
from captioner.training.trainer import Trainer

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "nltk", "wandb", "pycocotools")


def train(config: Config, output_dir: str | Path, resume: bool = False) -> dict[str, float]:
    """Train a captioner.

    Args:
        config: The experiment.
        output_dir: Folder of the run.
        resume: Continue the run in ``output_dir``, from its last checkpoint; the result is that
            of a run that was never interrupted.

    Returns:
        The validation scores of the best checkpoint.

    Raises:
        CaptionerError: Anything that a user can mend; most before training starts.
    """
    output_dir = Path(output_dir)
    check_decoder_kind(config.decoder.kind)
    output_dir.mkdir(parents=True, exist_ok=True)
    busy = ConfigError(
        f"{output_dir}: another process is training in this folder; wait for it, or take another "
        "--output-dir"
    )
    with locked(output_dir / ".lock", busy):
        saved = load_training_state(output_dir, config, resume)
        device = choose_device(config.training.device)
        precision = choose_precision(config.training.precision, device)
        torch.manual_seed(config.training.seed)

        train_set, val_set = load_splits(config)
        model = make_model(config, train_set, output_dir if saved else None).to(device)
        train_set, train_inputs = prepare_inputs(model, train_set, config, device, precision)
        val_set, val_inputs = prepare_inputs(model, val_set, config, device, precision)
        circumstances = Circumstances.of_run(train_set, val_set, precision, device)
        if saved:
            circumstances.check_same(Circumstances(**saved["circumstances"]), output_dir)
        save_run_record(config, output_dir, device, precision, train_set, val_set)

        trainer = Trainer(config, output_dir, model, device, precision, circumstances, saved)
        with trainer:
            return trainer.fit(train_set, train_inputs, val_set, val_inputs)


def load_splits(config: Config) -> tuple[CaptionDataset, CaptionDataset]:
    """Read the images and captions of train and val."""
    data = config.data
    train_set, val_set = (
        CaptionDataset.load(
            data.path(f"{split}_annotations"),
            data.path(f"{split}_images"),
            data.split(f"{split}_split"),
            data.bad_images,
        )
        for split in ("train", "val")
    )
    check_no_overlap(train_set, val_set)
    if config.validation.max_images:
        val_set = val_set.select(range(min(len(val_set), config.validation.max_images)))
    return train_set, val_set


def make_model(config: Config, train_set: CaptionDataset, resumed: Path | None) -> CaptioningModel:
    """Return a new model with the training captions' vocabulary, or that of a resumed run."""
    captions = [caption for image_captions in train_set.captions for caption in image_captions]
    vocabulary = Vocabulary.from_captions(captions, config.data.min_word_count)
    if resumed:
        model = load_checkpoint(resumed / "last")
        if model.vocabulary.words != vocabulary.words:
            raise CheckpointError(
                f"{resumed}/last: its vocabulary isn't that of {train_set.name}; the training "
                "captions have changed since, so this run can't be resumed"
            )
    else:
        cnn = config.encoder
        encoder = make_encoder(cnn.name, cnn.weights, config.preprocessing, cnn.last_stage)
        model = CaptioningModel(encoder, config.decoder, vocabulary, config.search)
    model.encoder.fine_tune_from(config.encoder.fine_tune_from)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log_line(
        f"{len(train_set)} training images, {len(captions)} captions, {len(vocabulary)} words; "
        f"{trained:,} parameters to train"
    )
    return model


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
    sessions = read_json(path, CheckpointError)["sessions"] if path.exists() else []
    sessions.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "git": git_state(),
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "precision": str(precision).removeprefix("torch."),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
    )
    write_json(path, {"config": config.to_dict(), "sessions": sessions})
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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"
