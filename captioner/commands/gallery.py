"""Make a page to look at captions and their images, with search, from a captions file.

  captioner gallery captions.jsonl --images photos --output page.html
  captioner gallery captions.jsonl --images photos --output page.html --checkpoint RUN

It works from the disk, without a server; the thumbnails are in a folder beside it, page_files. With
a checkpoint whose decoder has attention, the one that wrote the captions, it also shows what the
decoder looked at for each word.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import DataError, UsageError
from captioner.progress import print_line

if TYPE_CHECKING:
    from captioner.inference.records import Record


def _parser() -> argparse.ArgumentParser:
    parser = Parser("captioner gallery", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("captions", type=Path, help="a .jsonl output of captioner caption")
    parser.add_argument(
        "--images", type=Path, default=Path(), help="the folder that its file names start from"
    )
    parser.add_argument("--output", type=Path, required=True, help="the page")
    parser.add_argument("--title", help="what stands above it; by default the captions' name")
    parser.add_argument(
        "--checkpoint", type=Path, help="checkpoint directory or name, for the attention"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    args = _parser().parse_args(argv)
    if args.captions.suffix.lower() != ".jsonl":
        raise UsageError(f"{args.captions}: the name of a .jsonl file was expected")
    if not args.images.is_dir():
        raise DataError(f"{args.images}: no such folder")

    from captioner.inference.captioner import Captioner
    from captioner.inference.gallery import attention_of, write_gallery

    attention = None
    if args.checkpoint:
        attention = attention_of(Captioner.from_pretrained(args.checkpoint, args.device))
    records = _records(args.captions, args.images)
    count = write_gallery(args.output, records, args.title or args.captions.name, attention)
    print_line(f"{count} images in {args.output}")
    return 0


def _records(captions: Path, images: Path) -> "Iterator[Record]":
    """Walk through what a captions file says, and its failures."""
    from captioner.inference.outputs import failures_path, read_rows, record_of_row

    for _, row in read_rows(captions):
        record = record_of_row(row)
        yield dataclasses.replace(record, path=str(images / record.name))
    for _, row in read_rows(failures_path(captions), of_failures=True):
        yield record_of_row({"image_id": row["file_name"], **row})
