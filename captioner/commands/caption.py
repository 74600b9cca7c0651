"""``captioner caption``: caption images, and folders of them."""

import argparse
import dataclasses
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.checkpoint_directory import (
    WEIGHTS_FILE,
    default_checkpoint,
    find_checkpoint,
    is_checkpoint,
    is_pretrained,
)
from captioner.cli import HelpFormatter, Parser, command, output_is_closed, program_name
from captioner.config import SearchConfig
from captioner.errors import DataError, UsageError, name_some
from captioner.experiment_file import attribute_docs
from captioner.progress import LONG, log_line, print_line
from captioner.stopping import Stopped

if TYPE_CHECKING:  # torch takes seconds to import: --help must not wait for it
    from captioner.data.listing import Listing
    from captioner.inference.captioner import Captioner
    from captioner.inference.job import JobSettings, Summary

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


def _parser() -> argparse.ArgumentParser:
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
        "--overwrite-sidecars", action="store_true", help="even such a file is overwritten"
    )
    group.add_argument(
        "--gallery",
        type=Path,
        metavar="PAGE",
        help="an HTML page to look at all images and captions; see also captioner gallery",
    )
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
    if args.checkpoint or not args.inputs:
        return args.checkpoint
    first: Path = args.inputs[0]
    if not (is_checkpoint(first) or (is_pretrained(first) and not first.exists())):
        return None
    del args.inputs[0]
    if not args.inputs and not args.from_file:
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
    from captioner.inference.outputs import output_suffix

    if not args.inputs and not args.from_file:
        raise UsageError("the images or folders to caption are missing")
    if args.inputs and args.from_file:
        raise UsageError(f"either images and folders or --from-file, found {args.inputs[0]} too")
    if args.annotations and len(args.inputs) != 1:
        raise UsageError(f"--annotations needs exactly one folder, found {len(args.inputs)} inputs")
    if args.split and not args.annotations:
        raise UsageError("--split chooses among the images of --annotations, which is missing")
    if args.batch_size < 0:
        raise UsageError(f"--batch-size: at least 0 was expected, found {args.batch_size}")
    suffixes = [output_suffix(path) for path in args.output]
    if args.csv_safe and ".csv" not in suffixes:
        raise UsageError("--csv-safe needs an --output whose name ends in .csv")
    names = [path.name for path in args.output]
    if len(set(names)) < len(names):
        raise UsageError(f"--output: {name_some(args.output)}: two of these have the same name")
    if not args.output:
        for name in ("sidecars", "gallery", "hash", "retry", "redo", "append"):
            if getattr(args, name):
                raise UsageError(f"--{name} needs an --output, whose journal tells what is done")
    if not args.output and output_is_closed():
        raise UsageError("standard output is closed, and --output is missing")
    for path in [*args.output, *([args.gallery] if args.gallery else [])]:
        _check_writable(path)


def _listing(args: argparse.Namespace) -> "Listing":
    """Return the images that are meant."""
    from captioner.data.listing import Listing, Selection, Shard

    shard = None
    if args.shard:
        try:
            shard = Shard.parse(args.shard)
        except ValueError:
            raise UsageError(
                f"--shard: I/N with I from 1 to N was expected, such as 2/8, found {args.shard!r}"
            ) from None
    if args.annotations:
        return Listing.of_annotations(args.inputs[0], args.annotations, args.split, shard)
    if args.from_file:
        return Listing.of_list(args.from_file, args.zero, shard)
    selection = Selection(
        tuple(args.include), tuple(args.exclude), args.recursive, args.follow_links
    )
    return Listing.of_inputs(args.inputs, selection, shard)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Caption images; write or print the captions and say what went wrong."""
    args = _parser().parse_intermixed_args(argv)
    checkpoint = _take_checkpoint(args)
    _check_usage(args)

    from captioner.device import keep_freed_memory
    from captioner.inference.captioner import Captioner
    from captioner.inference.job import run_job

    keep_freed_memory()
    listing = _listing(args)
    checkpoints = [checkpoint or default_checkpoint(), *(args.ensemble or [])]
    captioner = Captioner.from_pretrained(checkpoints, args.device, args.precision)
    search = captioner.search(
        **{name: getattr(args, name) for name in attribute_docs(SearchConfig)}
    )
    if not args.output:
        return _print_captions(captioner, listing, search, args)
    whole = [path for path in args.output if path.suffix.lower() == ".json"]
    if search.n_best > 1 and len(whole) == len(args.output):
        raise UsageError(
            f"--output {whole[0]}: {search.n_best} captions of an image (search.n_best) need a "
            "name that ends in .jsonl, .csv or .sqlite"
        )
    settings = _job_settings(args)
    signature = _signature(checkpoints, captioner, search, args)
    try:
        summary = run_job(captioner, listing, search, settings, signature)
    except Stopped as stopped:
        cause = "Ctrl-C" if stopped.signal == signal.SIGINT else stopped.signal.name
        log_line(f"stopped by {cause}: what is done is kept; the same command goes on from here")
        return 128 + stopped.signal
    return _report(summary, settings, args)


def _job_settings(args: argparse.Namespace) -> "JobSettings":
    from captioner.inference.job import JobSettings

    names = {field.name for field in dataclasses.fields(JobSettings)} - {"outputs", "has_hash"}
    chosen = {name: getattr(args, name) for name in names}
    return JobSettings(outputs=tuple(args.output), has_hash=args.hash, **chosen)


def _signature(
    checkpoints: Sequence[Path],
    captioner: "Captioner",
    search: SearchConfig,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return what must stay the same for a job to go on."""
    from captioner.inference.job import file_sha256

    weights = [file_sha256(find_checkpoint(path) / WEIGHTS_FILE)[:16] for path in checkpoints]
    settings = {f"search.{name}": value for name, value in dataclasses.asdict(search).items()}
    return {
        "checkpoint": "+".join(weights),
        **{name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()},
        "--precision": str(captioner.precision).removeprefix("torch."),
        "--hash": args.hash,
        "--csv-safe": args.csv_safe,
    }


def _report(summary: "Summary", settings: "JobSettings", args: argparse.Namespace) -> int:
    """Say what a job has done and where it is; return the exit code."""
    from captioner.inference.outputs import failures_path

    reasons = failures_path(settings.outputs[0])
    if not summary.total:
        raise _nothing_captioned(args, summary.failed, f"; reasons in {reasons}")
    if not settings.quiet:
        now = f", {summary.captioned} of them now" if summary.captioned < summary.total else ""
        for path in settings.outputs:
            print_line(f"{summary.total} captions in {path}{now}")
        if settings.gallery:
            print_line(f"to look at them: {settings.gallery}")
        if summary.seconds >= LONG:
            rate = summary.captioned / summary.seconds
            log_line(f"{summary.captioned} images in {summary.seconds:.0f} s, {rate:.1f} a second")
        if summary.sidecars_left:
            log_line(
                f"{summary.sidecars_left} text files were left as they were: this tool did not "
                "write them (--overwrite-sidecars)"
            )
    _warn_of_empty(summary)
    if not summary.failed:
        return 0
    log_line(f"{_failures(summary)}; reasons in {reasons}")
    return 3


def _failures(summary: "Summary") -> str:
    count = summary.failed + summary.total
    names = name_some(summary.failed_names, count=summary.failed)
    return f"{summary.failed} of {count} images could not be captioned: {names}"


def _nothing_captioned(args: argparse.Namespace, failed: int, reasons: str = "") -> DataError:
    if failed:
        return DataError(f"none of {failed} images could be captioned{reasons}")
    return DataError(f"{name_some(args.inputs or [args.from_file])}: no image to caption")


def _print_captions(
    captioner: "Captioner", listing: "Listing", search: SearchConfig, args: argparse.Namespace
) -> int:
    """Print captions as they come."""
    from captioner.inference.folder import caption_stream
    from captioner.inference.job import Summary

    summary = Summary()
    images = listing.images(args.quiet)
    for records in caption_stream(captioner, images, search, args.batch_size, args.workers):
        summary.add(records)
        for record in records:
            if record.error:
                summary.failed += 1
                summary.failed_names += [record.name] if summary.failed <= 5 else []
                if not args.quiet:
                    log_line(f"warning: {record.error}")
            for caption in record.captions:
                score = [f"{caption.score:.4f}"] if search.n_best > 1 else []
                print_line(record.name, caption.text, *score)
    summary.total = summary.captioned
    if not summary.total:
        raise _nothing_captioned(args, summary.failed)
    _warn_of_empty(summary)
    if not summary.failed:
        return 0
    log_line(_failures(summary))
    return 3


def _warn_of_empty(summary: "Summary") -> None:
    if summary.empty_count:
        log_line(
            f"warning: {summary.empty_count} captions are empty, no caption that met the settings "
            f"was found: {name_some(summary.empty, count=summary.empty_count)}"
        )
