"""The options of ``captioner caption``."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioner.cli import HelpFormatter, Parser, program_name
from captioner.config import SearchConfig
from captioner.experiment_file import attribute_docs

DESCRIPTION = """\
Caption images, and all images in folders and the folders below them.

  captioner caption photos                    # with the captioner that comes with the package
  captioner caption RUN photos dog.jpg        # with your own
  captioner caption photos --output captions.jsonl captions.csv

A checkpoint directory (such as RUN/best, or RUN for short) is all that is needed: it holds the
weights, the vocabulary, the preprocessing and the settings. Where the first argument is one, or a
name that "captioner models" lists, it captions the others. Images that can't be captioned are
reported by name and left out; the exit code is then 3, or 1 where none could be.

Without --output the captions are printed, an image a line: its path, a tab, its caption, control
characters as escapes (\\n). Several captions of an image (--n-best) have a line each, and their
score behind them.

With --output the job may be stopped or killed at any moment: the same command goes on where it was,
and finished images are captioned again only if their files have changed. What is done is kept in
OUTPUT.journal, why images failed in OUTPUT.failures.jsonl.

The results' ids are the paths of the images: below the folder, where one folder is given; else as
given, with the folder's name.
"""


def caption_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = Parser(
        program_name("caption", "caption_folder.py"),
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="*",
        metavar="image_or_folder",
        help="what is captioned; before it a checkpoint directory or a captioner's name may come",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="checkpoint directory, or a captioner's name; all else is then captioned",
    )
    parser.add_argument(
        "--ensemble",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="further checkpoints, with the same vocabulary: probabilities are averaged",
    )
    _add_choice(parser)
    _add_outputs(parser)
    _add_search_settings(parser)
    _add_machine_settings(parser)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which images")
    group.add_argument(
        "--include",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="of folders just the images whose names or paths below fit: '*.jpg' '2024/*'",
    )
    group.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="of folders not the images and folders whose names or paths below fit",
    )
    group.add_argument(
        "--recursive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="walk through folders in folders",
    )
    group.add_argument("--follow-links", action="store_true", help="follow links to folders, too")
    group.add_argument(
        "--from-file", metavar="LIST", help="a file of paths, one a line; - is standard input"
    )
    group.add_argument(
        "--zero", action="store_true", help="paths in LIST end with NUL, as find -print0 does it"
    )
    group.add_argument(
        "--annotations",
        type=Path,
        help="caption just the images of the folder that this captions file lists, by its ids",
    )
    group.add_argument("--split", help="the images of this split of --annotations alone")
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="just the I-th of N parts (1/N to N/N), by a hash of the path; see captioner merge",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what becomes of the captions")
    group.add_argument(
        "--output",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files: captions.jsonl and .csv grow image by image; .json (COCO results format) and "
        ".sqlite are written at the end",
    )
    group.add_argument(
        "--csv-safe",
        action="store_true",
        help="for spreadsheets: put ' before cells of a .csv that begin with = + - @ tab or CR; "
        "what reads the file again sees the '",
    )
    group.add_argument(
        "--sidecars",
        action="store_true",
        help="write dog.txt beside dog.jpg; a file that this tool did not write stays as it is",
    )
    group.add_argument(
        "--metadata",
        type=Path,
        metavar="FOLDER",
        help="copies of the images in FOLDER, with the caption as their description (XMP, IPTC); "
        "'in-place' writes it into the images themselves",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="overwrite text files and descriptions that this tool did not write",
    )
    group.add_argument(
        "--gallery",
        type=Path,
        metavar="PAGE",
        help="an HTML page to look at all images and captions; see also captioner gallery",
    )
    _add_resuming(parser.add_argument_group("going on"))


def _add_resuming(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--hash",
        action="store_true",
        help="tell by their content (SHA-256) whether files changed, not by size and time, and "
        "write it into the outputs",
    )
    group.add_argument(
        "--retry", action="store_true", help="try images again that couldn't be captioned before"
    )
    begin = group.add_mutually_exclusive_group()
    begin.add_argument("--redo", action="store_true", help="begin anew: outputs are overwritten")
    begin.add_argument(
        "--append",
        action="store_true",
        help="go on although the checkpoint, the settings or the inputs are others",
    )
    group.add_argument(
        "--quiet", action="store_true", help="no progress, and no warnings of single images"
    )


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
    parser.add_argument(
        "--ray",
        action="store_true",
        help="spread the work over a Ray cluster (RAY_ADDRESS), or over this machine's cores; "
        "--workers is then how many processes, each with a model",
    )
    parser.add_argument(
        "--runtime",
        default="auto",
        choices=["auto", "torch", "onnx"],
        help="auto is onnx (onnxruntime, without torch) where the captioner is a folder that "
        "captioner export wrote",
    )
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of where and how precisely a captioner computes."""
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
