"""List the trained captioners that come with the package, or show the model card of one.

captioner models                        # names, scores and sizes
captioner models mobilenet-flickr8k     # what it was trained on, what it sees well and badly
"""

import argparse
from collections.abc import Sequence

from captioner.checkpoint_directory import (
    DEFAULT_NAME,
    PretrainedCaptioner,
    pretrained_captioners,
)
from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import UsageError, did_you_mean

SHOWN = ("BLEU-4", "CIDEr-D")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("captioner models", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("name", nargs="?", help="show the model card of this one")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    name = _parser().parse_args(argv).name
    captioners = {captioner.name: captioner for captioner in pretrained_captioners()}
    if name is None:
        for captioner in captioners.values():
            print(_line(captioner))
        if not captioners:
            print("this copy of the package comes without a trained captioner")
    elif name in captioners:
        print(captioners[name].card.rstrip())
    else:
        hint = did_you_mean(name, captioners) or f"; there are {', '.join(captioners) or 'none'}"
        raise UsageError(f"{name}: no captioner of this name comes with the package{hint}")
    return 0


def _line(captioner: PretrainedCaptioner) -> str:
    config = captioner.config
    scores = [f"{name} {100 * config['scores'][name]:.1f}" for name in SHOWN]
    parts = [
        captioner.name + (" (used where none is named)" if captioner.name == DEFAULT_NAME else ""),
        f"{config['encoder']['name']}, {config['decoder']['kind']}",
        f"val: {', '.join(scores)} (x 100)",
        f"{captioner.size / 1e6:.1f} MB",
        str(captioner.directory),
    ]
    return "\n    ".join(parts)
