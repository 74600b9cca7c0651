"""Put this project's scores beside those of the official COCO evaluation: values and seconds.

Needs Java and the extra ``official``. Without --hypotheses the first caption of each image is
scored against its others.
"""

import argparse
import contextlib
import io
import itertools
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captioner.cli import HelpFormatter, Parser, command
from captioner.data.annotations import ImageId, read_annotations
from captioner.data.tokenizer import tokenize
from captioner.metrics.evaluation import read_evaluation
from captioner.metrics.official import TOKENIZER_JAR, require
from captioner.metrics.scores import BLEU_NAMES, score, score_tokens

Captions = dict[ImageId, list[str]]
Outcome = tuple[float, np.ndarray, float]  # of the corpus, of each image, seconds


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--references", type=Path, required=True, help="captions that people wrote")
    parser.add_argument("--hypotheses", type=Path, help="captions to be scored")
    parser.add_argument("--images", type=int, help="score only the first so many images")
    parser.add_argument("--no-meteor", action="store_true", help="leave METEOR out (slow)")
    parser.add_argument(
        "--up-to",
        type=int,
        default=0,
        metavar="CAPTIONS",
        help="then time ours alone on the images again and again, up to so many captions",
    )
    options = parser.parse_args(argv)
    require(TOKENIZER_JAR)
    hypotheses, references = _captions(options)
    official = _score_officially(hypotheses, references, not options.no_meteor)
    ours = _score(hypotheses, references, not options.no_meteor)
    print(f"{len(references)} images, {sum(map(len, references.values()))} references")
    print("| metric | official | ours | difference | largest for an image | official s | ours s |")
    print("|---|---|---|---|---|---|---|")
    for name, (official_value, official_images, official_seconds) in official.items():
        value, images, seconds = ours[name]
        largest = float(np.abs(official_images - images).max()) if len(images) else 0.0
        print(
            f"| {name} | {official_value!r} | {value!r} | {value - official_value:.1e} "
            f"| {largest:.1e} | {official_seconds:.2f} | {seconds:.2f} |"
        )
    totals = [
        sum(outcome[2] for name, outcome in outcomes.items() if name != "METEOR")
        for outcomes in (official, ours)
    ]
    print(
        f"without METEOR: official {totals[0]:.2f} s, ours {totals[1]:.2f} s, "
        f"{totals[0] / totals[1]:.1f} times faster"
    )
    if options.up_to:
        _print_scaling(hypotheses, references, options.up_to)
    return 0


def _print_scaling(
    hypotheses: dict[ImageId, str], references: Captions, most_captions: int
) -> None:
    """Print seconds and memory for ever more captions: they must grow alike."""
    images = (
        most_captions * len(references) // (len(references) + sum(map(len, references.values())))
    )
    print("| images | captions | s | microseconds an image | peak MiB |")
    print("|---|---|---|---|---|")
    for share in (16, 4, 1):
        keys = list(itertools.islice(itertools.cycle(references), images // share))
        start = time.perf_counter()
        score(
            {number: hypotheses[key] for number, key in enumerate(keys)},
            {number: references[key] for number, key in enumerate(keys)},
            ["BLEU", "ROUGE-L", "CIDEr-D"],
        )
        seconds = time.perf_counter() - start
        captions = sum(1 + len(references[key]) for key in keys)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # Linux counts in KiB
        microseconds = 1e6 * seconds / len(keys)
        print(f"| {len(keys)} | {captions} | {seconds:.2f} | {microseconds:.0f} | {peak} |")


def _captions(options: argparse.Namespace) -> tuple[dict[ImageId, str], Captions]:
    if options.hypotheses:
        evaluation = read_evaluation(options.references, [options.hypotheses], allow_missing=True)
        ((_, hypotheses),) = evaluation.hypotheses.items()
        references = evaluation.references
    else:
        images = read_annotations(options.references).images
        several = [image for image in images if len(image.captions) > 1]
        hypotheses = {image.image_id: image.captions[0] for image in several}
        references = {image.image_id: image.captions[1:] for image in several}
    keys = list(references)[: options.images]
    return {key: hypotheses[key] for key in keys}, {key: references[key] for key in keys}


def _score_officially(
    hypotheses: dict[ImageId, str], references: Captions, meteor: bool
) -> dict[str, Outcome]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    outcomes: dict[str, Outcome] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        reference_tokens = PTBTokenizer().tokenize(
            {key: [{"caption": text} for text in texts] for key, texts in references.items()}
        )
        hypothesis_tokens = PTBTokenizer().tokenize(
            {key: [{"caption": text}] for key, text in hypotheses.items()}
        )
        outcomes["tokens"] = (0.0, np.zeros(0), time.perf_counter() - start)
        start = time.perf_counter()
        values, images = Bleu(4).compute_score(reference_tokens, hypothesis_tokens)
        seconds = time.perf_counter() - start
        for order, name in enumerate(BLEU_NAMES):
            outcomes[name] = (values[order], np.array(images[order]), seconds / 4)
        scorers: list[tuple[str, Any]] = [("ROUGE-L", Rouge), ("CIDEr-D", Cider)]
        for name, scorer in scorers + ([("METEOR", Meteor)] if meteor else []):
            start = time.perf_counter()
            value, images = scorer().compute_score(reference_tokens, hypothesis_tokens)
            outcomes[name] = (float(value), np.array(images), time.perf_counter() - start)
    return outcomes


def _score(
    hypotheses: dict[ImageId, str], references: Captions, meteor: bool
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    start = time.perf_counter()
    hypothesis_tokens = [tokenize(text) for text in hypotheses.values()]
    reference_tokens = [[tokenize(text) for text in texts] for texts in references.values()]
    outcomes["tokens"] = (0.0, np.zeros(0), time.perf_counter() - start)
    groups = [BLEU_NAMES, ("ROUGE-L",), ("CIDEr-D",), *([("METEOR",)] if meteor else [])]
    for names in groups:
        start = time.perf_counter()
        scores = score_tokens(hypothesis_tokens, reference_tokens, names)
        seconds = (time.perf_counter() - start) / len(names)
        for name in names:
            outcomes[name] = (scores.corpus[name], scores.per_image[name], seconds)
    whole = score(hypotheses, references, [name for group in groups for name in group])
    assert whole.corpus == {name: row[0] for name, row in outcomes.items() if name != "tokens"}
    return outcomes


if __name__ == "__main__":
    raise SystemExit(main())
