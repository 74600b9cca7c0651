"""``captioner train``: train a captioner from an experiment file."""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioner.cli import HelpFormatter, Parser, command, program_name
from captioner.experiment_file import load_stages

PROGRAM = ("train", "train.py")
DESCRIPTION = """\
Train a captioner from an experiment file.

Any setting of the file can be overridden, for example:
  {program} experiments/flickr8k_attention.toml decoder.cell=gru --output-dir runs/gru
The settings, their defaults and units are in captioner/config.py.

The stages of a file with [[stages]] are trained one after the other, each from the best checkpoint
of the one before. An override changes what they share, or with its name before it a single stage:
  {program} FILE training.seed=1 fine_tune.training.epochs=1 --output-dir runs/tuned
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train; print the best checkpoint's validation scores."""
    words = list(sys.argv[1:] if argv is None else argv)
    args, overrides = _parse(words)
    stages = load_stages(args.experiment, overrides, args.stages)

    from captioner.device import keep_freed_memory  # torch takes seconds to import; --help must not
    from captioner.stopping import Stopped
    from captioner.training.run import train
    from captioner.training.stages import has_run, train_stages

    keep_freed_memory()
    resume = args.resume or args.resume_or_start, args.resume_or_start
    try:
        if stages[0].name:
            rows = train_stages(stages, args.output_dir, *resume, args.stages)
        else:
            rows = [{"scores": train(stages[0].config, args.output_dir, *resume)}]
    except Stopped as stopped:
        cause = "Ctrl-C" if stopped.signal == signal.SIGINT else stopped.signal.name
        names = args.stages or [stage.name for stage in stages]
        resumable = any(has_run(args.output_dir / name) for name in names)
        print(
            f"stopped by {cause}; to go on:\n  {_command_again(words, resumable)}", file=sys.stderr
        )
        return 128 + stopped.signal
    _print_results(rows)
    print(f"best checkpoint: {args.output_dir / 'best'}")
    return 0


def _print_results(rows: list[dict[str, Any]]) -> None:
    """Print the scores of a run, or of each stage below its name."""
    for row in rows:
        if "name" in row:
            print(f"{row['name']}, best after {row['best_epoch']} of {row['epochs']} epochs:")
        for name, score in row["scores"].items():
            print(f"{name}: {score:.4f}")


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options and the overrides."""
    program = program_name(*PROGRAM)
    parser = Parser(
        program, description=DESCRIPTION.format(program=program), formatter_class=HelpFormatter
    )
    parser.add_argument("experiment", type=Path, help="experiment file (TOML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changed settings"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--stages",
        nargs="+",
        metavar="NAME",
        help="train just these stages of the experiment",
    )
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument(
        "--resume", action="store_true", help="continue the run in --output-dir where it stopped"
    )
    resume.add_argument(
        "--resume-or-start",
        action="store_true",
        help="continue the run, or start one if there is none; for jobs that restart",
    )
    args, unknown = parser.parse_known_intermixed_args(words)
    dashed = [word for word in unknown if "." in word.partition("=")[0]]  # --training.epochs=1
    if unknown and not dashed:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # What follows the last name of --stages is an override again.
    following = [word for word in args.stages or [] if "=" in word]
    names = [word for word in args.stages or [] if "=" not in word]
    if args.stages and not names:
        parser.error("argument --stages: expected at least one name")
    args.stages = names
    return args, [*dashed, *args.overrides, *following]


def _command_again(words: list[str], resumable: bool) -> str:
    """Return the command line that this process was started by, with --resume where it can."""
    again = [] if {"--resume", "--resume-or-start"} & set(words) or not resumable else ["--resume"]
    if sys.orig_argv[-len(words) :] == words:
        return shlex.join([*sys.orig_argv, *again])
    return f"{program_name(*PROGRAM)} {shlex.join([*words, *again])}"  # called from Python
