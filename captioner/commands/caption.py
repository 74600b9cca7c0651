"""``captioner caption``: caption a folder of images."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, command
from captioner.errors import UsageError, name_some
from captioner.progress import say
from captioner.results import results_format, write_results

DESCRIPTION = """\
Caption the images in a folder and the folders below it.

The checkpoint directory (such as RUN/best) is all that is needed: it holds the weights, the
vocabulary, the preprocessing and the settings. Images that can't be read are reported by name and
left out; the exit code is then 3.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "caption_folder.py", description=DESCRIPTION, formatter_class=HelpFormatter
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
    parser.add_argument("--beam-size", type=int, help="hypotheses kept; default: the checkpoint's")
    parser.add_argument("--max-length", type=int, help="most words; default: the checkpoint's")
    parser.add_argument(
        "--length-penalty",
        type=float,
        help="rank by log-probability / length ** this; default: the checkpoint's",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time")
    parser.add_argument(
        "--workers", type=int, default=-1, help="processes that read images; -1 is one a core"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="auto is bfloat16 where the device computes in it",
    )
    return parser


def _refuse_unwritable(path: Path) -> None:
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
    results_format(args.output)  # before hours of work, not after
    if args.split and not args.annotations:
        raise UsageError("--split chooses among the images of --annotations, which is missing")
    if args.batch_size < 1:
        raise UsageError(f"--batch-size: at least 1 was expected, found {args.batch_size}")
    _refuse_unwritable(args.output)

    from captioner.captioner import Captioner
    from captioner.folder import caption_files, find_images, listed_images

    if args.annotations:
        images = listed_images(args.folder, args.annotations, args.split)
    else:
        images = find_images(args.folder)
    captioner = Captioner.from_pretrained(args.checkpoint, args.device, args.precision)
    search = captioner.search(args.beam_size, args.max_length, args.length_penalty)
    captions, failed = caption_files(captioner, images, search, args.batch_size, args.workers)

    rows = [
        {"image_id": image.image_id, "file_name": image.name, "caption": captions[image.image_id]}
        for image in images
        if image.image_id in captions
    ]
    if results_format(args.output) == ".json":  # exactly the COCO results format
        rows = [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows]
    write_results(args.output, rows)
    print(f"{len(rows)} captions in {args.output}")
    if failed:
        say(f"{len(failed)} of {len(images)} images could not be read: {name_some(failed)}")
        return 3
    return 0
