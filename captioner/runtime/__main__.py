"""``python -m captioner.runtime``: captions by onnxruntime, numpy and Pillow alone."""

import argparse
from collections.abc import Sequence

from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import ImageError
from captioner.progress import log_line, print_line
from captioner.runtime.captioner import OnnxCaptioner


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each image: its path, a tab, its caption."""
    parser = Parser(
        "python -m captioner.runtime", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("folder", help="what captioner export wrote")
    parser.add_argument("images", nargs="+", metavar="image")
    parser.add_argument("--beam-size", type=int, help="hypotheses kept (default: as exported)")
    parser.add_argument("--max-length", type=int, help="most words (default: as exported)")
    parser.add_argument("--threads", type=int, default=0, help="that compute; 0 is one a core")
    args = parser.parse_args(argv)
    return _caption_all(args)


def _caption_all(args: argparse.Namespace) -> int:
    captioner = OnnxCaptioner(args.folder, args.threads)
    failed = 0
    for path in args.images:
        try:
            caption = captioner.caption(path, beam_size=args.beam_size, max_length=args.max_length)
            print_line(path, caption)
        except ImageError as error:
            log_line(f"warning: {error}")
            failed += 1
    if failed == len(args.images):
        return 1
    return 3 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
