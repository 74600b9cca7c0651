"""Draw the data set of rendered scenes: two objects a picture, five captions each.

DIR/images/{train,val,test}/ gets the pictures, DIR/annotations/captions_SPLIT.json the captions
(COCO format) and DIR/annotations/scenes_SPLIT.json what is where, for check_shapes.py. No scene
(sizes, colours, shapes and relation together) is in two splits. The same options give the same
files, byte for byte.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, Parser, command, program_name
from captioner.data.shapes_dataset import SPLITS, write_data_set
from captioner.progress import log_line


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = Parser(
        program_name("shapes", "make_shapes.py"), description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="folder to make; an earlier set is replaced"
    )
    for split, count in zip(SPLITS, (6000, 200, 400), strict=True):
        parser.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help=f"images in {split}"
        )
    parser.add_argument(
        "--image-size", type=int, default=64, metavar="PX", help="width and height in pixels"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides everything left to chance")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    counts = {split: getattr(options, split) for split in SPLITS}
    write_data_set(options.directory, counts, options.image_size, options.seed)
    drawn = ", ".join(f"{count} {split}" for split, count in counts.items())
    log_line(
        f"{options.directory}: {drawn} images of {options.image_size} x {options.image_size} px"
    )
    return 0
