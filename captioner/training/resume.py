"""What a run needs to go on where it stopped, as if it had never been interrupted."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

from captioner.checksums import CHECKSUMS_FILE, check_sha256, read_checksums, sha256_of
from captioner.config import Config
from captioner.data.dataset import CaptionDataset
from captioner.errors import CheckpointError, ConfigError
from captioner.experiment_file import parse
from captioner.files import open_together, parse_json, recover_directory
from captioner.models.weights import load_pickled
from captioner.progress import log_line
from captioner.training.distributed import ALONE, Processes

STATE_FILE = "training_state.pt"
FORMAT = 2  # 1: other weights in the optimiser

# Settings that may differ when a run is resumed: they don't change what is computed.
FREE_TO_CHANGE = {
    "data.root",
    "data.workers",
    "data.cache_dir",
    "training.device",
    "training.log_every",
    "training.gradient_flow_every",
    "training.checkpoint_every",
    "training.checkpoint_minutes",
    "training.keep_last",
    "training.deterministic",
    "training.patience",
    "validation.batch_size",
}


@dataclass
class TrainState:
    """How far a run is, besides weights and optimiser.

    Attributes:
        epoch: Epochs that are finished.
        batch: Batches of the next epoch that are finished.
        step: Optimiser steps taken.
        best_epoch, best_scores: Of the best checkpoint.
        wandb_id: The run in Weights & Biases.
        loss, tokens, seconds: Sums over the finished batches of this epoch.
        log_bytes: Length of log.jsonl when the state was saved.
        batch_images: Images in a batch, of all processes; 0 in the state of a run that was started
            before several could train.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    wandb_id: str | None = None
    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    log_bytes: int = 0
    batch_images: int = 0


@dataclass(frozen=True)
class Circumstances:
    """What a resumed run must find again, besides its settings, to end with the same weights.

    Attributes:
        train_sha256, val_sha256: Of image ids and captions of the splits.
        precision: In which the run really computes.
        device: Kind of the device ("cpu", "cuda", "mps").
        files_sha256: Of the sizes of all image files. This and what follows is "" or 0 in the
            state of a run that was started before it was recorded.
        device_name, torch_version, threads: The hardware, and what computes on it.
        processes: How many train together.
    """

    train_sha256: str
    val_sha256: str
    precision: str
    device: str
    files_sha256: str = ""
    device_name: str = ""
    torch_version: str = ""
    threads: int = 0
    processes: int = 1

    @classmethod
    def of_run(
        cls,
        train_set: CaptionDataset,
        val_set: CaptionDataset,
        precision: torch.dtype,
        device: torch.device,
        processes: int = 1,
    ) -> "Circumstances":
        """Return those of a run that is about to start."""
        sizes = [os.path.getsize(path) for path in (*train_set.paths, *val_set.paths)]
        return cls(
            _sha256([train_set.image_ids, train_set.captions]),
            _sha256([val_set.image_ids, val_set.captions]),
            str(precision).removeprefix("torch."),
            device.type,
            _sha256(sizes),
            name_of_device(device),
            str(torch.__version__),
            torch.get_num_threads(),
            processes,
        )

    def check_same(self, saved: "Circumstances", output_dir: Path) -> None:
        """Refuse to go on where a result would differ; say so where only rounding may.

        Raises:
            CheckpointError: Another split, other image files or another precision.
        """
        for split in ("train", "val"):
            if getattr(self, f"{split}_sha256") != getattr(saved, f"{split}_sha256"):
                raise CheckpointError(
                    f"{output_dir}: the images or captions of the {split} split have changed since "
                    "this run was started, so it can't be resumed"
                )
        if saved.files_sha256 and self.files_sha256 != saved.files_sha256:
            raise CheckpointError(
                f"{output_dir}: image files have other sizes than when this run was started, so it "
                "can't be resumed; bring the old files back, or start a new run"
            )
        if self.precision != saved.precision:
            raise CheckpointError(
                f"{output_dir}: this run was computed in {saved.precision}, and here it would be "
                f"{self.precision}; it can be resumed where {saved.precision} is native"
            )
        changes = [
            f"{what} {before} before and {now} now"
            for what, before, now in (
                ("device", saved.device_name or saved.device, self.device_name),
                ("torch", saved.torch_version, self.torch_version),
                ("CPU threads", saved.threads, self.threads),
                ("processes", saved.processes, self.processes),
            )
            if before and before not in (now, self.device)
        ]
        if changes:
            log_line(
                f"warning: {output_dir}: {'; '.join(changes)}: the weights will differ a little "
                "from those of an uninterrupted run"
            )


def name_of_device(device: torch.device) -> str:
    """Return a GPU's name, or the kind of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


def nothing_to_resume(output_dir: Path) -> CheckpointError:
    """Return the error for a folder that holds no run."""
    return CheckpointError(
        f"{output_dir}: there is no run to resume (no last/{STATE_FILE}); is it the right "
        "--output-dir? Without --resume a new run starts, with --resume-or-start one or the other"
    )


def run_is_there(output_dir: Path) -> ConfigError:
    """Return the error for a folder that holds a run already."""
    return ConfigError(
        f"{output_dir}: a run is there already; --resume continues it, another --output-dir "
        "starts a new one"
    )


def load_training_state(
    output_dir: Path, config: Config, resume: bool, or_start: bool = False
) -> dict[str, Any] | None:
    """Read what a run needs to be resumed; None if it starts from the beginning.

    Args:
        output_dir: The run's folder.
        config: The experiment, which must be that of the run.
        resume: Whether the run is to be resumed.
        or_start: Whether it is to start from the beginning where there is nothing to resume.

    Raises:
        ConfigError: A run is there, but it is not to be resumed.
        CheckpointError: The state can't be read, or is that of another experiment.
    """
    for name in ("last", "best"):
        recover_directory(output_dir / name)
    path = output_dir / "last" / STATE_FILE
    if not resume and ((output_dir / "last").exists() or (output_dir / "best").exists()):
        raise run_is_there(output_dir)
    if not resume:
        return None
    if not path.exists():
        if not or_start or (output_dir / "last").exists() or (output_dir / "best").exists():
            raise nothing_to_resume(output_dir)
        return None
    state = _read_state(path)
    # Settings that are newer than the run take their defaults.
    saved = parse(Config, parse_json(state["config"], str(path), CheckpointError), str(path))
    check_same_settings(saved.to_dict(), config.to_dict(), output_dir)
    return state


# What a state holds: see ``pack_state``.
STATE_CONTENT = {
    "config": str,
    "train_state": dict,
    "circumstances": dict,
    "optimizer": dict,
    "rng": torch.Tensor,
    "rng_cuda": list,
}


def _read_state(path: Path) -> dict[str, Any]:
    """Return a state that holds what ``pack_state`` puts there.

    Raises:
        CheckpointError: It is damaged, something else, or of another version.
    """
    files = open_together(path.parent, [STATE_FILE], [CHECKSUMS_FILE], CheckpointError)
    with contextlib.ExitStack() as opened:
        for file in files.values():
            opened.enter_context(file)
        checksums = read_checksums(files.get(CHECKSUMS_FILE), path.parent)
        check_sha256(sha256_of(files[STATE_FILE]), path, checksums)
        files[STATE_FILE].seek(0)
        try:
            state = load_pickled(files[STATE_FILE])
            _check_content(state, path)
        except (ValueError, ConfigError) as error:
            raise CheckpointError(
                f"{path}: not a training state that can be resumed ({error}); copy the run again, "
                "or start a new one in another --output-dir"
            ) from None
    return state


def _check_content(state: Any, path: Path) -> None:
    """Raise a ValueError or ConfigError unless a state holds what ``pack_state`` puts there."""
    if not isinstance(state, dict):
        raise ValueError(f"a dict was expected, found {type(state).__name__}")
    state_format = state.get("format", 1)
    if not isinstance(state_format, int) or state_format != FORMAT:
        raise CheckpointError(
            f"{path}: written by another version of captioner (format {state_format!s:.20}, "
            f"{FORMAT} was expected): finish the run with that version, or start a new one"
        )
    for name, kind in STATE_CONTENT.items():
        if not isinstance(state.get(name), kind):
            found = type(state[name]).__name__ if name in state else "nothing"
            raise ValueError(f"'{name}': {kind.__name__} was expected, found {found}")
    parse(TrainState, state["train_state"], "train_state")
    parse(Circumstances, state["circumstances"], "circumstances")
    try:
        for rng in (state["rng"], *(rng for rng, _ in state.get("rng_others", []))):
            torch.Generator().set_state(rng)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError("'rng': not the state of a random generator") from None


def check_same_settings(saved: dict[str, Any], given: dict[str, Any], output_dir: Path) -> None:
    """Raise a CheckpointError if a run's result would be another with the settings given now."""
    for section in given:
        for key, value in given[section].items():
            name, before = f"{section}.{key}", saved.get(section, {}).get(key)
            if value != before and section != "wandb" and name not in FREE_TO_CHANGE:
                raise CheckpointError(
                    f"{output_dir}: this run was started with {name} = {before!r}, and can't be "
                    f"resumed with {value!r}"
                )


Randomness = tuple[torch.Tensor, list[torch.Tensor]]  # of a process: on the CPU, on its GPU


def randomness_of(device: torch.device) -> Randomness:
    """Return the states of this process's random generators."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return torch.get_rng_state(), on_gpu


def seed_process(config: Config, step: int, rank: int) -> None:
    """Give one of several processes random numbers of its own, by seed, step and rank."""
    sequence = np.random.SeedSequence((config.training.seed, step, rank))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def pack_state(
    state: TrainState,
    circumstances: Circumstances,
    config: Config,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    randomness: Sequence[Randomness],
) -> dict[str, Any]:
    """Return all that resuming needs besides the weights, as tensors and plain values.

    Args:
        state: How far the run is.
        circumstances: Of the run.
        config: Of the run.
        optimizer: The optimiser.
        average: The average of the weights, if there is one.
        randomness: Of each process.
    """
    (rng, rng_cuda), *others = randomness
    return {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "train_state": dataclasses.asdict(state),
        "circumstances": dataclasses.asdict(circumstances),
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict() if average else {},
        "rng": rng,
        "rng_cuda": rng_cuda,
        "rng_others": others,
    }


def unpack_state(
    packed: dict[str, Any],
    config: Config,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    device: torch.device,
    processes: Processes = ALONE,
) -> TrainState:
    """Return the saved state; set optimiser, average and random generators to where they were.

    Random generators of another number of processes are seeded anew.

    Raises:
        CheckpointError: The optimiser or the average is that of another model.
    """
    state = TrainState(**packed["train_state"])
    try:
        optimizer.load_state_dict(packed["optimizer"])
        if average:
            average.load_state_dict(packed["average"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"last/{STATE_FILE}: its optimiser or average isn't that of this model ({error}); "
            "start a new run in another --output-dir"
        ) from None
    randomness = [(packed["rng"], packed["rng_cuda"]), *packed.get("rng_others", [])]
    if len(randomness) != processes.count:
        seed_process(config, state.step, processes.rank)
    else:
        rng, rng_cuda = randomness[processes.rank]
        torch.set_rng_state(rng)
        if device.type == "cuda" and rng_cuda:
            torch.cuda.set_rng_state(rng_cuda[0], device)
    log_line(f"resuming after step {state.step}, in epoch {state.epoch + 1}")
    return state
