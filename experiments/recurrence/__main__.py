"""``python -m experiments.recurrence``: run one study or all, and assemble the page."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import CaptionerError
from captioner.progress import log_line
from experiments.recurrence import (
    depth,
    gates,
    gradients,
    lengths,
    memory,
    sequences,
    tagging,
    unshuffle,
)
from experiments.recurrence.captioning import METRICS, captioning, draw_captioning
from experiments.recurrence.cells_at_work import cells_at_work, draw_cells_at_work
from experiments.recurrence.cost import cost, draw_cost
from experiments.recurrence.course import course, gains, records_of
from experiments.recurrence.drawings import draw_course
from experiments.recurrence.pictures import Record, draw_models
from experiments.recurrence.study import HERE, Setting, Study, run, write_page


def _of_models(measure: Callable[[Setting], list[Record]], **labels: str) -> Study:
    draw = partial(draw_models, labels)
    return Study(measure, draw, ("model",), (*labels, "parameters"))


# These are small networks, which one thread serves best: "all" runs as many studies at a time as
# there are cores, the longest first, and then "cost", which wants the machine for itself.
STUDIES: dict[str, Study] = {
    "one_to_one": _of_models(
        sequences.one_to_one, accuracy="share of photographs", f1="F1 of dogs"
    ),
    "many_to_one": _of_models(sequences.many_to_one, accuracy="share of captions"),
    "unshuffle": _of_models(
        unshuffle.unshuffle,
        right_place="share of words at their place",
        whole_captions="share of captions in order",
    ),
    "reversal": _of_models(
        unshuffle.reversal,
        right_place="share of words at their place",
        whole_captions="share of captions in reverse",
    ),
    "tagging": _of_models(
        tagging.tagging,
        accuracy="share of words, both kinds",
        before="share of words, noun before",
        after="share of words, noun after",
    ),
    "next_word": _of_models(sequences.next_word, perplexity="perplexity, words"),
    "time_series": Study(
        sequences.time_series, sequences.draw_time_series, ("model",), ("error", "parameters")
    ),
    "gradient_distance": Study(
        gradients.gradient_distance,
        gradients.draw_gradient_distance,
        ("cell", "start", "of"),
        tuple(f"{distance}_back" for distance in gradients.DISTANCES),
    ),
    "steps_or_features": Study(
        lengths.steps_or_features,
        lengths.draw_steps_or_features,
        ("cell", "read_as"),
        ("error", "error_of_60", "parameters", "seconds"),
    ),
    "any_length": Study(
        lengths.any_length,
        lengths.draw_any_length,
        ("model",),
        (*(f"error_{length}" for length in lengths.TESTED), "parameters"),
    ),
    "depth": Study(
        depth.depth,
        depth.draw_depth,
        ("cell", "layers"),
        ("perplexity", "parameters", "seconds", "solved", "batches"),
    ),
    "spectral_radius": Study(
        gradients.spectral_radius,
        gradients.draw_spectral_radius,
        ("regime", "radius"),
        ("50_back", "slope"),
    ),
    "exploding": Study(
        gradients.exploding,
        gradients.draw_exploding,
        ("cell", "start", "length", "clipping"),
        ("lost", "steps", "infinite", "largest_norm", "last_loss"),
    ),
    "adding": Study(
        memory.adding,
        memory.draw_adding,
        ("remedy", "length"),
        ("rate", "solved", "died", "steps_if_solved", "error"),
    ),
    "gates": Study(
        gates.gates,
        gates.draw_gates,
        ("model",),
        ("solved", "batches", "error", "perplexity", "weights"),
    ),
    "truncation": Study(
        memory.truncation, memory.draw_truncation, ("cell", "window", "span"), ("accuracy",)
    ),
    "cost": Study(
        cost,
        draw_cost,
        ("width", "cell"),
        (
            "parameters",
            "milliseconds",
            "microseconds_of_a_step",
            "megabytes",
            "time_of_lstm",
            "step_of_lstm",
            "parameters_of_lstm",
        ),
    ),
    "captioning": Study(
        captioning,
        draw_captioning,
        ("cell", "embedding_scale", "rate", "features"),
        (
            *(f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")),
            "p_against_lstm",
            "train_loss",
            "val_loss",
            "image_share",
        ),
    ),
    "cells_at_work": Study(cells_at_work, draw_cells_at_work, ("cell", "epoch"), ("val_loss",)),
}
LONGEST = ("captioning", "adding")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run studies; write results, pictures and the page."""
    parser = Parser(
        "python -m experiments.recurrence",
        description="Studies of recurrence: what RNN, GRU and LSTM can and cannot do.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "study", choices=[*STUDIES, "all", "page"], help="page assembles README.md alone"
    )
    parser.add_argument("--quick", action="store_true", help="try every part in seconds")
    parser.add_argument(
        "--output", type=Path, help="folder of the page (default: here; quick: runs/recurrence)"
    )
    parser.add_argument("--data", default="", help="folder of Flickr8k")
    parser.add_argument("--weights", default="", help="weights of the CNN, as encoder.weights")
    parser.add_argument(
        "--wandb", choices=["offline", "online", "disabled"], default="offline", help="tracking"
    )
    args = parser.parse_args(argv)
    output = args.output or (Path("runs/recurrence") if args.quick else HERE)
    setting = Setting(output, args.quick, args.data, args.weights, args.wandb)
    if args.study == "all":
        _run_all(sys.argv[1:] if argv is None else argv)
    elif args.study != "page":
        run(args.study, STUDIES[args.study], setting)
    write_page(STUDIES, setting, _write_course() if output == HERE else "")
    print(f"page: {output / 'README.md'}")
    return 0


def _write_course() -> str:
    """Draw the course's pictures, and return its text."""
    of = records_of(HERE / "results")
    draw_course(HERE / "lesson", of("cells_at_work"), gains(of))
    return course(HERE / "results")


def _run_all(argv: Sequence[str]) -> None:
    """Run each study in a process of its own."""

    def run_one(name: str) -> int:
        words = [name if word == "all" else word for word in argv]
        threads = {} if name == "cost" else {"OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "experiments.recurrence", *words]
        return subprocess.run(line, env=os.environ | threads, check=False).returncode

    started = time.monotonic()
    together = sorted(set(STUDIES) - {"cost"}, key=lambda name: name not in LONGEST)
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        codes = dict(zip(together, processes.map(run_one, together), strict=True))
    codes["cost"] = run_one("cost")
    failed = [name for name in STUDIES if codes[name]]
    if failed:
        raise CaptionerError(f"these studies failed, as said above: {', '.join(failed)}")
    log_line(f"all studies: {(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    sys.exit(main())
