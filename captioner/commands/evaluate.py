"""Score captions against references.

References may be COCO captions, a Karpathy split file (with --split) or a captions CSV;
hypotheses are a results file as caption_folder.py writes it (.json, .jsonl or .csv).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, command
from captioner.evaluation import read_pairs
from captioner.files import write_json
from captioner.metrics import compute_metrics
from captioner.progress import say


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        "evaluate_bleu.py", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--references", type=Path, required=True, help="captions that people wrote")
    parser.add_argument("--hypotheses", type=Path, required=True, help="captions to be scored")
    parser.add_argument(
        "--split", help="images of the references to take: a split name, or a file listing images"
    )
    parser.add_argument("--output", type=Path, help="write the scores here as JSON")
    parser.add_argument(
        "--allow-missing", action="store_true", help="score the images that both files have"
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    pairs = read_pairs(options.hypotheses, options.references, options.split, options.allow_missing)
    for note in pairs.notes:
        say(f"warning: {note}")
    scores = compute_metrics(pairs.hypotheses, pairs.references)
    for name, score in scores.items():
        print(f"{name}  {score:.4f}")
    if options.output:
        write_json(options.output, {**scores, "images": len(pairs.hypotheses)})
    return 0
