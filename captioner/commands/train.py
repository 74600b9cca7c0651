"""``captioner train``: train a captioner from an experiment file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, command, program_name
from captioner.experiment_file import load_config

DESCRIPTION = """\
Train a captioner from an experiment file.

Any setting of the file can be overridden, for example:
  train.py experiments/flickr8k_attention.toml decoder.cell=gru --output-dir runs/gru
The settings, their defaults and units are in captioner/config.py.
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train; print the best checkpoint's validation scores."""
    parser = argparse.ArgumentParser(
        program_name("train", "train.py"), description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("experiment", type=Path, help="experiment file (TOML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changed settings"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --output-dir where it stopped"
    )
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.experiment, args.overrides)

    from captioner.device import keep_freed_memory  # torch takes seconds to import; --help must not
    from captioner.training.run import train

    keep_freed_memory()
    scores = train(config, args.output_dir, args.resume)
    for name, score in scores.items():
        print(f"{name}: {score:.4f}")
    print(f"best checkpoint: {args.output_dir / 'best'}")
    return 0
