"""``captioner caption``: caption images, and folders of them."""

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.checkpoint_directory import default_checkpoint, is_checkpoint, is_pretrained
from captioner.cli import HelpFormatter, Parser, command, output_is_closed, program_name
from captioner.config import SearchConfig
from captioner.data.annotations import ImageId
from captioner.data.predictions import predictions_format, write_predictions
from captioner.errors import DataError, UsageError, name_some
from captioner.experiment_file import attribute_docs
from captioner.progress import log_line, print_line

if TYPE_CHECKING:  # torch takes seconds to import: --help must not wait for it
    from captioner.inference.captioner import Caption
    from captioner.inference.folder import ImageFile

DESCRIPTION = """\
Caption images, and all images in folders and the folders below them.

  captioner caption photos                    # with the captioner that comes with the package
  captioner caption RUN photos dog.jpg        # with your own

A checkpoint directory (such as RUN/best, or RUN for short) is all that is needed: it holds the
weights, the vocabulary, the preprocessing and the settings. Where the first argument is one, or a
name that "captioner models" lists, it captions the others. Images that can't be captioned are
reported by name and left out; the exit code is then 3, or 1 where none could be.

Without --output the captions are printed, an image a line: its path, a tab, its caption, control
characters as escapes (\\n). Several captions of an image (--n-best) have a line each, and their
score behind them.

The results' ids are the paths of the images: below the folder, where one folder is given; else as
given, with the folder's name.
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        program_name("caption", "caption_folder.py"),
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="image_or_folder",
        help="what is captioned; before it a checkpoint directory or a captioner's name may come",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="checkpoint directory, or a captioner's name; all else is then captioned",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="captions.json (COCO results format), captions.jsonl or captions.csv",
    )
    parser.add_argument(
        "--csv-safe",
        action="store_true",
        help="for spreadsheets: put ' before cells of a .csv that begin with = + - @ tab or CR; "
        "what reads the file again sees the '",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        help="caption just the images of the folder that this captions file lists, by its ids",
    )
    parser.add_argument("--split", help="the images of this split of --annotations alone")
    parser.add_argument(
        "--ensemble",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="further checkpoints, with the same vocabulary: probabilities are averaged",
    )
    _add_search_settings(parser)
    _add_machine_settings(parser)
    return parser


def _add_machine_settings(parser: argparse.ArgumentParser) -> None:
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


class _NegatedFlag(argparse.Action):
    """An option for a setting whose name begins with ``no_``, and its opposite without it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        self.positive = option_strings[0].replace("--no-", "--", 1)
        options = [*option_strings, self.positive]
        super().__init__(options, dest, nargs=0, help=f"{help} {self.positive} allows it.")

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, option_string != self.positive)


def _add_search_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each search setting, explained as in ``SearchConfig``."""
    group = parser.add_argument_group("search", "The defaults are the checkpoint's own settings.")
    explained = attribute_docs(SearchConfig)
    for field in dataclasses.fields(SearchConfig):
        flag, text = f"--{field.name.replace('_', '-')}", explained[field.name].replace("%", "%%")
        default = field.default
        if isinstance(default, bool) and field.name.startswith("no_"):
            group.add_argument(flag, action=_NegatedFlag, help=text)
        elif isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(default, tuple):
            group.add_argument(flag, nargs="+", metavar="WORDS", help=text)
        else:
            group.add_argument(flag, type=type(default), help=text)


def _take_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint that is named; where it is the first input, it is none any longer."""
    first: Path = args.inputs[0]
    if args.checkpoint or not (
        is_checkpoint(first) or (is_pretrained(first) and not first.exists())
    ):
        return args.checkpoint
    del args.inputs[0]
    if not args.inputs:
        raise UsageError(f"{first}: the images or folders to caption are missing after it")
    return first


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"--output {path}: can't be written ({error.strerror})") from None
    if path.is_dir():
        raise UsageError(f"--output {path}: this is a folder, a file was expected")


def _check_usage(args: argparse.Namespace) -> None:
    """Refuse what can't end well before hours of work, not after."""
    if args.annotations and len(args.inputs) > 1:
        raise UsageError(f"--annotations needs exactly one folder, found {len(args.inputs)} inputs")
    if args.split and not args.annotations:
        raise UsageError("--split chooses among the images of --annotations, which is missing")
    if args.batch_size < 0:
        raise UsageError(f"--batch-size: at least 0 was expected, found {args.batch_size}")
    suffix = predictions_format(args.output) if args.output else ""
    if args.csv_safe and suffix != ".csv":
        raise UsageError("--csv-safe needs an --output whose name ends in .csv")
    if args.output:
        _check_writable(args.output)
    elif output_is_closed():
        raise UsageError("standard output is closed, and --output is missing")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Caption images; write or print the captions and say what went wrong."""
    args = _parser().parse_intermixed_args(argv)
    checkpoint = _take_checkpoint(args)
    _check_usage(args)

    from captioner.device import keep_freed_memory
    from captioner.inference.captioner import Captioner
    from captioner.inference.folder import caption_files, find_images, listed_images

    keep_freed_memory()
    if args.annotations:
        images = listed_images(args.inputs[0], args.annotations, args.split)
    else:
        images = find_images(args.inputs)
    checkpoints = [checkpoint or default_checkpoint(), *(args.ensemble or [])]
    captioner = Captioner.from_pretrained(checkpoints, args.device, args.precision)
    settings = {name: getattr(args, name) for name in attribute_docs(SearchConfig)}
    search = captioner.search(**settings)
    if args.output and search.n_best > 1 and predictions_format(args.output) != ".jsonl":
        raise UsageError(
            f"--output {args.output}: {search.n_best} captions of an image (search.n_best) need a "
            "name that ends in .jsonl"
        )
    captions, failed = caption_files(captioner, images, search, args.batch_size, args.workers)
    if not captions:
        kept = f"; {args.output} is not written" if args.output else ""
        raise DataError(f"none of {len(images)} images could be captioned{kept}")
    captioned = [image for image in images if image.image_id in captions]
    if args.output:
        rows = [_row(image, captions[image.image_id], search.n_best) for image in captioned]
        _write(args.output, rows, args.csv_safe)
    else:
        for image in captioned:
            _print(image, captions[image.image_id], search.n_best)
    _warn_of_empty(captions)
    if failed:
        log_line(
            f"{len(failed)} of {len(images)} images could not be captioned: {name_some(failed)}"
        )
        return 3
    return 0


def _write(output: Path, rows: list[dict[str, Any]], csv_safe: bool) -> None:
    if predictions_format(output) == ".json":  # exactly the COCO results format
        rows = [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows]
    write_predictions(output, rows, csv_safe)
    print_line(f"{len(rows)} captions in {output}")


def _print(image: "ImageFile", captions: Sequence["Caption"], n_best: int) -> None:
    for caption in captions:
        score = [f"{caption.score:.4f}"] if n_best > 1 else []
        print_line(image.name, caption.text, *score)


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
        row["captions"] = [caption.text for caption in captions]
        row["log_probabilities"] = [_finite(caption.log_probability) for caption in captions]
        row["scores"] = [_finite(caption.score) for caption in captions]
    return row


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
