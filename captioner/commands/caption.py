"""``captioner caption``: caption images, and folders of them."""

import argparse
import dataclasses
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.checkpoint_directory import (
    is_checkpoint,
    is_pretrained,
)
from captioner.cli import command, output_is_closed
from captioner.commands.caption_options import caption_parser
from captioner.errors import DataError, UsageError, name_some
from captioner.progress import LONG, log_line, print_line
from captioner.runtime.exported import is_exported
from captioner.stopping import Stopped

if TYPE_CHECKING:  # torch takes seconds to import: --help must not wait for it
    from captioner.commands.caption_engines import Engine
    from captioner.data.listing import Listing
    from captioner.inference.job import JobSettings, Summary


def _take_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint that is named; where it is the first input, it is none any longer."""
    if args.checkpoint or not args.inputs:
        return args.checkpoint
    first: Path = args.inputs[0]
    known = is_checkpoint(first) or is_exported(first)
    if not (known or (is_pretrained(first) and not first.exists())):
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
        for name in ("sidecars", "metadata", "gallery", "ray", "hash", "retry", "redo", "append"):
            if getattr(args, name):
                raise UsageError(f"--{name} needs an --output, whose journal tells what is done")
    if args.hash and str(args.metadata) == "in-place":
        raise UsageError("--metadata in-place changes the files' contents, which --hash compares")
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
    args = caption_parser().parse_intermixed_args(argv)
    checkpoint = _take_checkpoint(args)
    _check_usage(args)

    from captioner.commands.caption_engines import make_engine

    listing = _listing(args)
    engine = make_engine(args, checkpoint)
    if not args.output:
        return _print_captions(engine, listing, args)
    from captioner.inference.job import run_job

    whole = [path for path in args.output if path.suffix.lower() == ".json"]
    if engine.search.n_best > 1 and len(whole) == len(args.output):
        raise UsageError(
            f"--output {whole[0]}: {engine.search.n_best} captions of an image (search.n_best) "
            "need a name that ends in .jsonl, .csv or .sqlite"
        )
    settings = _job_settings(args)
    signature = {**engine.signature, "--hash": args.hash, "--csv-safe": args.csv_safe}
    attention = engine.attention if args.gallery else None
    try:
        summary = run_job(engine.stream, listing, engine.search, settings, signature, attention)
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
                "write them (--overwrite)"
            )
        if summary.metadata_left:
            log_line(f"{summary.metadata_left} images have no description of this tool's")
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


def _print_captions(engine: "Engine", listing: "Listing", args: argparse.Namespace) -> int:
    """Print captions as they come."""
    from captioner.inference.job import Summary

    summary = Summary()
    for records in engine.stream(listing.images(args.quiet)):
        summary.add(records)
        for record in records:
            if record.error:
                summary.failed += 1
                summary.failed_names += [record.name] if summary.failed <= 5 else []
                if not args.quiet:
                    log_line(f"warning: {record.error}")
            for caption in record.captions:
                score = [f"{caption.score:.4f}"] if engine.search.n_best > 1 else []
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
