"""Write a page that captions photographs in the browser.

captioner page site                               # with the captioner in the package
captioner page site runs/coco/best --precision float16
captioner page site exported                      # with what captioner export wrote
python -m http.server --directory site            # any static server does

onnxruntime-web, which computes in the browser, is fetched from the npm registry once.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from captioner.checkpoint_directory import default_checkpoint, find_checkpoint
from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import UsageError
from captioner.page.onnxruntime_web import ONNXRUNTIME_WEB, read_onnxruntime_web
from captioner.page.writer import is_page, write_page
from captioner.progress import print_line
from captioner.runtime.exported import ExportConfig, is_exported


def _parser() -> argparse.ArgumentParser:
    parser = Parser("captioner page", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=Path, help="where; a page that is there is replaced")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="checkpoint directory, a run's folder, a captioner's name, or an exported captioner "
        "(default: the captioner in the package)",
    )
    parser.add_argument(
        "--precision",
        choices=["float32", "float16", "int8"],
        help="of the weights that are fetched (default: int8, a third of float32)",
    )
    parser.add_argument(
        "--onnxruntime-web",
        type=Path,
        metavar="PATH",
        help=f"the npm package onnxruntime-web {ONNXRUNTIME_WEB.version}, its archive or folder; "
        "nothing is fetched then",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    if args.folder.exists() and not (is_page(args.folder) or _is_empty(args.folder)):
        raise UsageError(f"{args.folder} is there, and no page that this command wrote")
    onnxruntime_web = read_onnxruntime_web(args.onnxruntime_web)
    with tempfile.TemporaryDirectory() as aside:
        exported = _exported(args, Path(aside) / "exported")
        write_page(args.folder, exported, onnxruntime_web)
        precision = ExportConfig.read(exported).precision
    model, runtime = (_size(args.folder / name) for name in ("model", "onnxruntime-web"))
    print_line(
        f"{args.folder}: captioner in {precision}, {model / 1e6:.1f} MB; onnxruntime-web, "
        f"{runtime / 1e6:.1f} MB"
    )
    print_line(f"to look at it: python -m http.server --directory {args.folder}")
    return 0


def _exported(args: argparse.Namespace, aside: Path) -> Path:
    """Return the exported captioner that is meant; one that isn't exported yet is, into a folder.

    Raises:
        UsageError: It is exported with another precision.
    """
    if args.checkpoint and is_exported(args.checkpoint):
        precision = ExportConfig.read(Path(args.checkpoint)).precision
        if args.precision not in (None, precision):
            raise UsageError(f"{args.checkpoint} was exported in {precision}; export it again")
        return Path(args.checkpoint)

    from captioner.inference.onnx_export import export_captioner
    from captioner.models.checkpoint import load_checkpoint

    found = find_checkpoint(args.checkpoint) if args.checkpoint else default_checkpoint()
    export_captioner(load_checkpoint(found), aside, args.precision or "int8")
    return aside


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
