"""Write a captioner as ONNX graphs, which caption without torch.

captioner export RUN exported                     # float32: the captions of the checkpoint
captioner export mobilenet-flickr8k small --precision int8
captioner caption exported photos                 # by onnxruntime
python -m captioner.runtime exported dog.jpg      # the same where onnxruntime, numpy and Pillow are
                                                  # all there is
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from captioner.checkpoint_directory import find_checkpoint
from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import UsageError
from captioner.progress import print_line
from captioner.runtime.exported import is_exported


def _parser() -> argparse.ArgumentParser:
    parser = Parser("captioner export", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "checkpoint", help="checkpoint directory, a run's folder, or a captioner's name"
    )
    parser.add_argument(
        "folder", type=Path, help="where; an exported captioner that is there is replaced"
    )
    parser.add_argument(
        "--precision",
        default="float32",
        choices=["float32", "float16", "int8"],
        help="of the weights in the files; float16 has half the size, int8 a third",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    if args.folder.exists() and not (is_exported(args.folder) or _is_empty(args.folder)):
        raise UsageError(f"{args.folder} is there, and not an exported captioner")

    from captioner.inference.onnx_export import export_captioner
    from captioner.models.checkpoint import load_checkpoint

    export_captioner(load_checkpoint(find_checkpoint(args.checkpoint)), args.folder, args.precision)
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    print_line(f"{args.folder}: {args.precision}, {size / 1e6:.1f} MB")
    return 0


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
