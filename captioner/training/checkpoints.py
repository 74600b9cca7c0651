"""The checkpoints of a run: ``best``, ``last``, and a few earlier ``last`` if they are wanted."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from captioner.data.annotations import ImageId
from captioner.data.predictions import write_predictions
from captioner.errors import CheckpointError
from captioner.files import atomic_directory, recover_directory, remove_directory
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import save_checkpoint
from captioner.training.resume import STATE_FILE

PREDICTIONS_FILE = "val_predictions.json"


def write_checkpoint(
    directory: Path,
    model: CaptioningModel,
    scores: dict[str, float],
    captions: Mapping[ImageId, str] | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint that replaces the one that is there, if any.

    Args:
        directory: Where.
        model: What is saved.
        scores: What it has reached.
        captions: Of the validation that has just been; None keeps those of the checkpoint before.
        state: What resuming needs: see ``resume.pack_state``.

    Raises:
        CheckpointError: It can't be written, and the one that was there stays.
    """
    with _naming(directory), atomic_directory(directory) as aside:
        previous = directory / PREDICTIONS_FILE
        if captions is not None:
            rows = [{"image_id": i, "caption": text} for i, text in captions.items()]
            write_predictions(aside / PREDICTIONS_FILE, rows)
        elif previous.exists():
            shutil.copyfile(previous, aside / PREDICTIONS_FILE)
        if state is not None:
            _save_state(aside / STATE_FILE, state)
        save_checkpoint(model, aside, scores)  # last: its checksums are of all files


def _save_state(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of an archive that was cut short by what was raised before
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextlib.contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Turn what goes wrong in writing a checkpoint into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{directory}: can't be written ({reason}); what was there before is still there: "
            "make room, or mend the disk, then go on with --resume-or-start"
        ) from None


def keep_last(last: Path, step: int, count: int) -> None:
    """Keep a checkpoint as ``last-STEP``, and of all such the latest ``count``.

    Its files are the same on the disk: checkpoints are replaced, and never changed.

    Args:
        last: The checkpoint.
        step: Optimiser steps taken.
        count: How many are kept; 0 leaves all as they are.
    """
    if not count:
        return
    copy = last.with_name(f"{last.name}-{step}")
    with _naming(copy), atomic_directory(copy) as aside:
        shutil.copytree(last, aside, copy_function=_link_or_copy, dirs_exist_ok=True)
    pattern = re.compile(rf"(\.?){re.escape(last.name)}-(\d+)(\.\w+\.tmp)?")
    found = [match for name in os.listdir(last.parent) if (match := pattern.fullmatch(name))]
    for left_over in (match[2] for match in found if match[1]):  # by a process that was killed
        recover_directory(last.with_name(f"{last.name}-{left_over}"))
    for number in sorted(int(match[2]) for match in found if not match[1])[:-count]:
        remove_directory(last.with_name(f"{last.name}-{number}"))


def _link_or_copy(source: str, target: str) -> None:
    with contextlib.suppress(OSError):  # a file system without links
        os.link(source, target)
        return
    shutil.copy2(source, target)
