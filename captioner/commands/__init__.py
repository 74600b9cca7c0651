"""The commands: ``captioner train|caption|evaluate|…``; each is also a file in ``tools/``."""

import importlib
import sys
from collections.abc import Sequence

from captioner.cli import command
from captioner.errors import UsageError, did_you_mean
from captioner.version import __version__

COMMANDS = {
    "train": "train a captioner from an experiment file",
    "runs": "show the runs of a folder side by side",
    "caption": "caption images and folders of them",
    "export": "write a captioner as ONNX graphs, to caption without torch",
    "page": "write a page that captions photographs in the browser",
    "merge": "join the captions of several jobs, each over a part of the images",
    "gallery": "make a page to look at captions and their images",
    "evaluate": "score captions against references",
    "shapes": "draw the data set of rendered scenes",
    "check_shapes": "say whether captions of rendered scenes are true",
    "download": "fetch COCO images, captions and the Karpathy split",
    "serve": "caption what is sent over HTTP, with a page",
    "models": "list the trained captioners that come with the package",
    "cache": "list the features that are kept on disk, and remove them",
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; every command has its own ``--help``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: captioner COMMAND [options]    (captioner COMMAND --help tells more)\n")
        print("\n".join(f"  {name:10} {purpose}" for name, purpose in COMMANDS.items()))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"captioner {__version__}")
        return 0
    if words[0] not in COMMANDS:
        hint = did_you_mean(words[0], COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UsageError(f"captioner: no command '{words[0]}'{hint}")
    chosen = importlib.import_module(f"captioner.commands.{words[0]}")
    return chosen.main(words[1:])
