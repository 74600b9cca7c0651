"""``captioner download``: fetch COCO images, captions and the Karpathy split."""

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from captioner.cli import HelpFormatter, Parser, command, program_name
from captioner.data.coco import (
    COCO_ARCHIVES,
    Archive,
    fetch_archive,
    place_karpathy_images,
)
from captioner.errors import DataError, UsageError
from captioner.files import locked
from captioner.progress import log_line

DESCRIPTION = """\
Fetch COCO 2017 and the Karpathy split into DIR:

  DIR/train2017/, DIR/val2017/           118,287 and 5,000 images (19.3 GB and 0.8 GB)
  DIR/annotations/captions_*2017.json    captions
  DIR/annotations/dataset_*.json         Karpathy splits of COCO, Flickr8k and Flickr30k
  DIR/annotations/dataset_coco2017.json  the COCO split with file paths of train2017 and val2017

Stopped or cut off, the same command goes on where it was. An archive is compared with its
published size and SHA-256 (size alone for the Karpathy splits) and each file with its CRC-32.
An archive that lies in DIR/downloads already is used, not fetched."""

EPILOG = """\
A mirror given by --base-url has the archives at URL/zips/train2017.zip, URL/zips/val2017.zip,
URL/annotations/annotations_trainval2017.zip and URL/caption_datasets.zip."""

WHAT = {
    "images": ("val2017", "train2017"),
    "train2017": ("train2017",),
    "val2017": ("val2017",),
    "annotations": ("annotations",),
    "karpathy": ("karpathy",),
}

EXPERIMENT = "experiments/coco_show_attend_tell_resnet101.toml"
# The experiment is for the Karpathy split; this trains it on the official one.
OFFICIAL_DATA = (
    "data.train_annotations=annotations/captions_train2017.json",
    "data.train_split=",
    "data.train_images=train2017",
    "data.val_annotations=annotations/captions_val2017.json",
    "data.val_split=",
    "data.val_images=val2017",
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what is missing, then print where things lie and the command that trains on them."""
    options = _parser().parse_args(argv)
    archives = _archives(options)
    directory = options.directory
    (directory / "downloads").mkdir(parents=True, exist_ok=True)
    busy = DataError(f"{directory}: another download into it is at work; wait for it")
    with locked(directory / "downloads" / ".lock", busy):
        changed = [fetch_archive(archive, directory, options.keep_archives) for archive in archives]
        if (directory / "annotations" / "dataset_coco.json").exists():
            place_karpathy_images(directory)
    if not any(changed):
        log_line(f"nothing to do: everything asked for is already in {directory}")
    print(_summary(directory))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program_name("download", "download_coco.py"),
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="where everything goes")
    parser.add_argument(
        "--what",
        nargs="+",
        choices=WHAT,
        default=["images", "annotations", "karpathy"],
        help="what to fetch; 'images' is train2017 and val2017",
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        default=argparse.SUPPRESS,
        help="a mirror to fetch from, in place of images.cocodataset.org and cs.stanford.edu",
    )
    parser.add_argument(
        "--any-content",
        action="store_true",
        help="accept archives other than the published ones (a subset, a mirror that packed them "
        "anew): sizes and SHA-256 aren't compared; CRC-32 and the most bytes "
        "that are received and unpacked still are",
    )
    parser.add_argument(
        "--keep-archives",
        action="store_true",
        help="leave the archives in DIR/downloads; otherwise each is deleted when it is unpacked",
    )
    return parser


def _archives(options: argparse.Namespace) -> list[Archive]:
    """Return the archives asked for, the small ones first: a wrong address shows at once."""
    wanted = {name for what in options.what for name in WHAT[what]}
    archives = [archive for name, archive in COCO_ARCHIVES.items() if name in wanted]
    if "base_url" in options:
        base = options.base_url.rstrip("/")
        if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).hostname:
            raise UsageError(f"--base-url {options.base_url}: an http or https address is expected")
        archives = [replace(archive, url=_at(base, archive.url)) for archive in archives]
    return [replace(archive, published=not options.any_content) for archive in archives]


def _at(base: str, url: str) -> str:
    """Return where a mirror has an archive: see EPILOG."""
    folder = re.search(r"(zips/|annotations/)?[^/]+$", url)
    assert folder
    return f"{base}/{folder[0]}"


def _summary(directory: Path) -> str:
    """Return where things lie and, where all is there that it takes, how to train on them."""
    split = directory / "annotations" / "dataset_coco2017.json"
    captions = [directory / "annotations" / f"captions_{x}2017.json" for x in ("train", "val")]
    images = [directory / "train2017", directory / "val2017"]
    lines = [f"images    {path}" for path in images if path.exists()]
    lines += [f"captions  {path}" for path in captions if path.exists()]
    lines += [f"split     {split}"] if split.exists() else []
    data = () if split.exists() else OFFICIAL_DATA
    if all(path.exists() for path in ([split] if split.exists() else captions) + images):
        words = ["python", "tools/train.py", EXPERIMENT, f"data.root={directory}", *data]
        words += ["--output-dir", "runs/coco"]
        lines += ["train with", "  " + shlex.join(words)]
    return "\n".join(lines)
