"""``python -m experiments.recurrence``: run one study or all, and assemble the page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, command
from experiments.recurrence import memory, sequences
from experiments.recurrence.captioning import captioning
from experiments.recurrence.cost import cost
from experiments.recurrence.study import HERE, Setting, Study, run, write_page

STUDIES: dict[str, Study] = {
    "one_to_one": sequences.one_to_one,
    "many_to_one": sequences.many_to_one,
    "unshuffle": sequences.unshuffle,
    "next_word": sequences.next_word,
    "time_series": sequences.time_series,
    "gradient_distance": memory.gradient_distance,
    "exploding": memory.exploding,
    "adding": memory.adding,
    "truncation": memory.truncation,
    "cost": cost,
    "captioning": captioning,
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run studies; write results, pictures and the page."""
    parser = argparse.ArgumentParser(
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
    names = {"all": list(STUDIES), "page": []}.get(args.study, [args.study])
    for name in names:
        run(name, STUDIES[name], setting)
        write_page(STUDIES, setting)
    if not names:
        write_page(STUDIES, setting)
    print(f"page: {output / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
