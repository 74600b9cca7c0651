"""What captions the images of ``captioner caption``: torch, a Ray cluster, or onnxruntime."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.checkpoint_directory import WEIGHTS_FILE, default_checkpoint, find_checkpoint
from captioner.config import SearchConfig
from captioner.errors import UsageError
from captioner.experiment_file import attribute_docs
from captioner.memory import keep_freed_memory
from captioner.runtime.exported import EXPORT_FILE, STEP_FILE, is_exported

if TYPE_CHECKING:  # torch takes seconds to import
    from captioner.data.listing import ImageFile
    from captioner.inference.gallery import Attention
    from captioner.inference.records import Record

    Stream = Callable[[Iterable[ImageFile]], Iterator[list[Record]]]


@dataclass(frozen=True)
class Engine:
    """A captioner, ready for a job.

    Attributes:
        search: How it searches.
        stream: Captions images in order, batch by batch.
        signature: What it is, by the names that a user knows: must be the same when a job goes on.
        attention: What it looks at, for the gallery; None where there is nothing to show.
    """

    search: SearchConfig
    stream: "Stream"
    signature: dict[str, Any]
    attention: "Attention | None" = None


def make_engine(args: argparse.Namespace, checkpoint: Path | None) -> Engine:
    """Load the captioner that is meant.

    Args:
        args: Of the command line.
        checkpoint: A checkpoint, a captioner's name or an exported folder; None is the package's.

    Raises:
        UsageError: Options were given that this captioner doesn't have.
    """
    exported = checkpoint is not None and is_exported(checkpoint)
    if args.runtime == "onnx" and not exported:
        raise UsageError(
            f"--runtime onnx: {checkpoint or 'the captioner in the package'} isn't exported "
            f"(it has no {EXPORT_FILE}): captioner export makes a folder that can be used so"
        )
    if args.runtime == "torch" and exported:
        raise UsageError(f"--runtime torch: {checkpoint} is exported; use the checkpoint itself")
    settings = {name: getattr(args, name) for name in attribute_docs(SearchConfig)}
    if checkpoint is not None and exported:
        return _onnx_engine(args, checkpoint, settings)
    checkpoints = [checkpoint or default_checkpoint(), *(args.ensemble or [])]
    return _torch_engine(args, checkpoints, settings)


def _torch_engine(
    args: argparse.Namespace, checkpoints: Sequence[Path], settings: dict[str, Any]
) -> Engine:
    from captioner.inference.captioner import Captioner
    from captioner.inference.folder import caption_stream
    from captioner.inference.gallery import attention_of

    keep_freed_memory()  # when all is imported: what that takes once is given back
    directories = [find_checkpoint(path) for path in checkpoints]
    captioner = Captioner.from_pretrained(directories, args.device, args.precision)
    search = captioner.search(**settings)

    def stream(images: "Iterable[ImageFile]") -> "Iterator[list[Record]]":
        if not args.ray:
            return caption_stream(captioner, images, search, args.batch_size, args.workers)
        from captioner.inference.ray_stream import ray_stream

        sizes = args.batch_size, max(0, args.workers)
        return ray_stream(checkpoints, images, search, *sizes, args.precision)

    precision = str(captioner.precision).removeprefix("torch.")
    paths = [directory / WEIGHTS_FILE for directory in directories]
    attention = None
    if len(checkpoints) == 1:
        attention = attention_of(captioner, **dataclasses.asdict(search))
    return Engine(search, stream, _signature(paths, search, precision), attention)


def _onnx_engine(args: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> Engine:
    from captioner.inference.gallery import attention_of
    from captioner.inference.onnx_stream import onnx_stream
    from captioner.runtime.captioner import OnnxCaptioner

    for name in ("ensemble", "ray"):
        if getattr(args, name):
            raise UsageError(f"--{name} needs a checkpoint; {folder} is an exported captioner")
    keep_freed_memory()
    captioner = OnnxCaptioner(folder)
    search = captioner.search(**settings)

    def stream(images: "Iterable[ImageFile]") -> "Iterator[list[Record]]":
        return onnx_stream(captioner, images, search, args.batch_size, args.workers)

    signature = _signature([folder / STEP_FILE], search, f"onnx {captioner.config.precision}")
    attention = attention_of(captioner, **dataclasses.asdict(search))
    return Engine(search, stream, signature, attention)


def _signature(files: Sequence[Path], search: SearchConfig, precision: str) -> dict[str, Any]:
    from captioner.inference.job import file_sha256

    settings = {f"search.{name}": value for name, value in dataclasses.asdict(search).items()}
    return {
        "checkpoint": "+".join(file_sha256(path)[:16] for path in files),
        **{name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()},
        "--precision": precision,
    }
