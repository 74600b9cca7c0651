"""``captioner caption``: caption a folder of images."""

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.cli import HelpFormatter, command, program_name
from captioner.config import SearchConfig
from captioner.data.annotations import ImageId
from captioner.data.predictions import predictions_format, write_predictions
from captioner.errors import UsageError, name_some
from captioner.experiment_file import attribute_docs
from captioner.progress import log_line

if TYPE_CHECKING:  # torch takes seconds to import: --help must not wait for it
    from captioner.inference.captioner import Caption
    from captioner.inference.folder import ImageFile

DESCRIPTION = """\
Caption the images in a folder and the folders below it.

The checkpoint directory (such as RUN/best) is all that is needed: it holds the weights, the
vocabulary, the preprocessing and the settings. Images that can't be read are reported by name and
left out; the exit code is then 3.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program_name("caption", "caption_folder.py"),
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("folder", type=Path, help="folder of images")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="captions.json (COCO results format), captions.jsonl or captions.csv",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        help="caption just the images listed in this captions file, and use its ids",
    )
    parser.add_argument("--split", help="the images of this split of --annotations alone")
    parser.add_argument(
        "--ensemble",
        type=Path,
        nargs="+",
        default=[],
        metavar="CHECKPOINT",
        help="further checkpoints, with the same vocabulary: probabilities are averaged",
    )
    _add_search_settings(parser)
    parser.add_argument(
        "--batch-size", type=int, default=0, help="images at a time; 0 is what fits into memory"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=-1,
        help="processes (GPU) or threads (CPU) that read images; -1 is one a core",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="auto is bfloat16 where the device computes in it",
    )
    return parser


def _add_search_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each search setting, explained as in ``SearchConfig``."""
    group = parser.add_argument_group("search", "The defaults are the checkpoint's own settings.")
    explained = attribute_docs(SearchConfig)
    for field in dataclasses.fields(SearchConfig):
        flag, text = f"--{field.name.replace('_', '-')}", explained[field.name].replace("%", "%%")
        default = field.default
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(default, tuple):
            group.add_argument(flag, nargs="+", metavar="WORDS", help=text)
        else:
            group.add_argument(flag, type=type(default), help=text)


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"--output {path}: can't be written ({error.strerror})") from None
    if path.is_dir():
        raise UsageError(f"--output {path}: this is a folder, a file was expected")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Caption a folder; write the captions and say what went wrong."""
    args = _parser().parse_args(argv)
    predictions_format(args.output)  # before hours of work, not after
    if args.split and not args.annotations:
        raise UsageError("--split chooses among the images of --annotations, which is missing")
    if args.batch_size < 0:
        raise UsageError(f"--batch-size: at least 0 was expected, found {args.batch_size}")
    _check_writable(args.output)

    from captioner.device import keep_freed_memory
    from captioner.inference.captioner import Captioner
    from captioner.inference.folder import caption_files, find_images, listed_images

    keep_freed_memory()
    if args.annotations:
        images = listed_images(args.folder, args.annotations, args.split)
    else:
        images = find_images(args.folder)
    checkpoints = [args.checkpoint, *args.ensemble]
    captioner = Captioner.from_pretrained(checkpoints, args.device, args.precision)
    settings = {name: getattr(args, name) for name in attribute_docs(SearchConfig)}
    search = captioner.search(**settings)
    if search.n_best > 1 and predictions_format(args.output) != ".jsonl":
        raise UsageError(
            f"--output {args.output}: {search.n_best} captions of an image (search.n_best) need a "
            "name that ends in .jsonl"
        )
    captions, failed = caption_files(captioner, images, search, args.batch_size, args.workers)

    rows = [
        _row(image, captions[image.image_id], search.n_best)
        for image in images
        if image.image_id in captions
    ]
    if predictions_format(args.output) == ".json":  # exactly the COCO results format
        rows = [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows]
    write_predictions(args.output, rows)
    print(f"{len(rows)} captions in {args.output}")
    _warn_of_empty(captions)
    if failed:
        log_line(f"{len(failed)} of {len(images)} images could not be read: {name_some(failed)}")
        return 3
    return 0


def _warn_of_empty(captions: "Mapping[ImageId, Sequence[Caption]]") -> None:
    empty = [name for name, best in captions.items() if best[0].log_probability == -math.inf]
    if empty:
        log_line(
            f"warning: {len(empty)} captions are empty, no caption that met the settings was "
            f"found: {name_some(empty)}"
        )


def _row(image: "ImageFile", captions: Sequence["Caption"], n_best: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "image_id": image.image_id,
        "file_name": image.name,
        "caption": captions[0].text,
    }
    if n_best > 1:
        scores = (each.log_probability for each in captions)
        row["captions"] = [each.text for each in captions]
        row["log_probabilities"] = [score if math.isfinite(score) else None for score in scores]
    return row
