"""Join the captions of several jobs, each over a part of the same images.

  captioner caption photos --shard 1/2 --output 1.jsonl      # on one machine
  captioner caption photos --shard 2/2 --output 2.jsonl      # on another
  captioner merge 1.jsonl 2.jsonl --images photos --output captions.jsonl captions.csv

With --images the captions come in the order of the folder, and images that no part has are named;
the exit code is then 3, as where images failed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import UsageError, name_some
from captioner.progress import log_line, print_line


def _parser() -> argparse.ArgumentParser:
    parser = Parser("captioner merge", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "parts", type=Path, nargs="+", help=".jsonl outputs; their failures files are read too"
    )
    parser.add_argument(
        "--output",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="files that end in .jsonl, .csv, .json (COCO results format) or .sqlite; those that "
        "are there are overwritten",
    )
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="FOLDER", help="what all jobs were given"
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Join the parts and say what is missing."""
    args = _parser().parse_args(argv)

    from captioner.data.listing import Listing
    from captioner.inference.merging import merge_parts
    from captioner.inference.outputs import failures_path, output_suffix

    for path in args.output:
        output_suffix(path)
        if path in args.parts:
            raise UsageError(f"--output {path}: this is one of the parts")
    listing = Listing.of_inputs(args.images) if args.images else None
    merged = merge_parts(args.parts, args.output, listing)
    for path in args.output:
        print_line(f"{merged.captioned} captions in {path}")
    if merged.failed:
        reasons = failures_path(args.output[0])
        log_line(f"{merged.failed} images could not be captioned; reasons in {reasons}")
    if merged.missing:
        names = name_some(merged.missing_names, count=merged.missing)
        log_line(f"{merged.missing} images are missing: no part has {names}")
    return 3 if merged.failed or merged.missing else 0
