"""``captioner train``: train a captioner from an experiment file."""

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioner.cli import HelpFormatter, Parser, command, program_name
from captioner.errors import CaptionerError, ProcessError
from captioner.experiment_file import Stage, load_stages
from captioner.progress import hush

PROGRAM = ("train", "train.py")
DESCRIPTION = """\
Train a captioner from an experiment file.

Any setting of the file can be overridden, for example:
  {program} experiments/flickr8k_attention.toml decoder.cell=gru --output-dir runs/gru
The settings, their defaults and units are in captioner/config.py.

The stages of a file with [[stages]] are trained one after the other, each from the best checkpoint
of the one before. An override changes what they share, or with its name before it a single stage:
  {program} FILE training.seed=1 fine_tune.training.epochs=1 --output-dir runs/tuned

In several processes, say one for each GPU, that take training.batch_size images each; they start
again from the last checkpoint when one dies:
  torchrun --nproc-per-node=4 --max-restarts=3 tools/train.py FILE --output-dir runs/four \\
      --resume-or-start
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; print the best checkpoint's validation scores."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return _main(argv)
    # One of several processes must not wait for the others when it fails: they wait for it.
    code = 1
    try:
        code = _main(argv)
    except SystemExit as usage:
        code = int(usage.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


@command
def _main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args, overrides = _parse(words)
    if int(os.environ.get("RANK", 0)):
        hush()
    stages = _load_stages(args, overrides)

    from captioner.memory import keep_freed_memory
    from captioner.stopping import Stopped
    from captioner.training.distributed import Processes
    from captioner.training.run import train
    from captioner.training.stages import has_run, train_stages

    keep_freed_memory()
    processes = Processes.of_environment()
    resume = args.resume or args.resume_or_start, args.resume_or_start
    try:
        if stages[0].name:
            rows = train_stages(stages, args.output_dir, *resume, args.stages, processes)
        else:
            rows = [{"scores": train(stages[0].config, args.output_dir, *resume, processes)}]
    except Stopped as stopped:
        if processes.is_first:
            names = args.stages or [stage.name for stage in stages]
            resumable = any(has_run(args.output_dir / name) for name in names)
            _print_how_to_go_on(stopped.signal, words, resumable, processes.count)
        return 128 + stopped.signal
    if processes.is_first:
        _print_results(rows)
        print(f"best checkpoint: {args.output_dir / 'best'}")
    return 0


def _load_stages(args: argparse.Namespace, overrides: list[str]) -> list[Stage]:
    """Read the experiment; of the processes of a machine one says what is wrong with it."""
    try:
        return load_stages(args.experiment, overrides, args.stages)
    except CaptionerError as error:
        if int(os.environ.get("LOCAL_RANK", 0)):
            raise ProcessError("") from error
        raise


def _print_how_to_go_on(
    number: signal.Signals, words: list[str], resumable: bool, processes: int
) -> None:
    cause = "Ctrl-C" if number == signal.SIGINT else number.name
    if processes > 1:
        line = "the same torchrun command, with --resume-or-start at its end"
    else:
        line = _command_again(words, resumable)
    print(f"stopped by {cause}; to go on:\n  {line}", file=sys.stderr)


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
