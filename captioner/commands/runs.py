"""Show the runs of a folder side by side: best scores, epochs, rate, time left, and their state.

  captioner runs runs
  watch captioner runs runs          # while they train

A run is a folder that captioner train has made, a stage of an experiment too, at any depth. The
scores are those of its best checkpoint in validation. "running" means that a process trains in
it at this moment, on this machine or another one that shares the disk; the time left is for all
epochs, at the pace of the last one.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import DataError
from captioner.progress import printable
from captioner.training.overview import RunOverview, describe_run, duration, find_runs

SHOWN = ("BLEU-4", "CIDEr-D")
TITLES = ("run", *SHOWN, "best epoch", "epochs", "images/s", "time left", "state")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("captioner runs", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the runs are")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    folder = _parser().parse_args(argv).folder
    runs = find_runs(folder)
    if not runs:
        raise DataError(
            f"{folder}: no run in it; the folder that captioner train --output-dir names was "
            "expected, or one above it"
        )
    rows = [TITLES, *(_cells(describe_run(run, time.time())) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def _cells(run: RunOverview) -> tuple[str, ...]:
    """Return a run's row of the table."""
    scores = [f"{run.scores[name]:.4f}" if name in run.scores else "-" for name in SHOWN]
    cells = (
        run.folder,
        *scores,
        "-" if run.best_epoch is None else run.best_epoch,
        "-" if run.epochs is None else f"{run.epochs_done}/{run.epochs}",
        "-" if run.images_per_second is None else f"{run.images_per_second:,.0f}",
        "-" if run.seconds_left is None else duration(run.seconds_left),
        run.state,
    )
    return tuple(map(printable, cells))
