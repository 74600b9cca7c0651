r"""Score captions against references: BLEU-1 to BLEU-4, and the other COCO metrics when asked.

The numbers are those of the official COCO caption evaluation, without Java (METEOR and SPICE
need it). CIDEr-D is what the official tool prints as "CIDEr".

References may be COCO captions, a Karpathy split file (with --split) or a captions CSV;
hypotheses are result files as caption_folder.py writes them (.json, .jsonl or .csv).

  evaluate_bleu.py --references captions_val.json --hypotheses captions.json
  evaluate_bleu.py --references captions_val.json --hypotheses a.json b.json \
      --metrics BLEU,ROUGE-L,CIDEr-D --confidence --report page.html --images val2017
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from captioner.cli import HelpFormatter, command, program_name
from captioner.data.annotations import read_annotations
from captioner.data.tokenizer import tokenize
from captioner.errors import DataError, UsageError
from captioner.files import parse_json, read_text, write_json
from captioner.metrics.diversity import describe, self_bleu
from captioner.metrics.evaluation import Evaluation, read_evaluation, signature, write_per_image
from captioner.metrics.scores import DocumentFrequencies, Scores, metric_names, score
from captioner.metrics.significance import confidence_interval, paired_test, resampled_metrics
from captioner.progress import log_line


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        program_name("evaluate", "evaluate_bleu.py"),
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--references", type=Path, required=True, help="captions that people wrote")
    add("--hypotheses", type=Path, nargs="+", required=True, help="result files to be scored")
    add("--split", help="images to take: a split's name, or a text file that lists images")
    add("--allow-missing", action="store_true", help="score the images that all files have")
    add(
        "--metrics",
        default="BLEU",
        help="all, or a list with commas: BLEU, BLEU-1 … BLEU-4, "
        "ROUGE-L, CIDEr-D, CIDEr, METEOR, SPICE",
    )
    add("--confidence", action="store_true", help="95%% intervals, by resampling images")
    add("--statistics", action="store_true", help="diversity and length of the captions")
    add(
        "--training-captions",
        type=Path,
        help="captions file, for the share of captions that are not in it (with --statistics)",
    )
    add(
        "--n-best",
        type=Path,
        help="JSON lines with 'image_id' and 'captions', for self-BLEU (with --statistics)",
    )
    add(
        "--frequencies",
        type=Path,
        help="document frequencies for CIDEr, instead of those of the references",
    )
    add("--save-frequencies", type=Path, help="write the references' document frequencies here")
    add("--output", type=Path, help="write scores and signature here as JSON")
    add("--per-image", type=Path, help="write each image's scores here as CSV")
    add("--plot", type=Path, help="draw how scores are spread, as .png, .svg or .pdf")
    add("--report", type=Path, help="write a page of best and worst images here as HTML")
    add("--images", type=Path, help="folder of the images, for the page")
    add("--link-images", action="store_true", help="link to the images instead of embedding them")
    add("--wandb", metavar="PROJECT", help="log to a new run of this project in Weights & Biases")
    add("--wandb-run", metavar="ID", help="log to this run of the project instead")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    metrics = metric_names(name.strip() for name in options.metrics.split(",") if name.strip())
    if not metrics:
        raise UsageError("--metrics: no metric is named")
    evaluation = read_evaluation(
        options.references, options.hypotheses, options.split, options.allow_missing
    )
    for note in evaluation.notes:
        log_line(f"warning: {note}")
    frequencies = DocumentFrequencies.load(options.frequencies) if options.frequencies else None
    scores = {
        name: score(captions, evaluation.references, metrics, frequencies)
        for name, captions in evaluation.hypotheses.items()
    }
    for reason in dict.fromkeys(r for each in scores.values() for r in each.unavailable.values()):
        log_line(f"left out: {reason}")
    computed = list(next(iter(scores.values())).corpus)
    frequencies_name = options.frequencies.name if options.frequencies else ""
    summary: dict[str, Any] = {
        "scores": {name: each.corpus for name, each in scores.items()},
        "images": len(evaluation.references),
        "references": sum(map(len, evaluation.references.values())),
        "signature": signature(evaluation, computed, frequencies_name),
    }
    if options.confidence:
        summary["confidence_95"] = {
            name: {metric: confidence_interval(each, metric) for metric in resampled_metrics(each)}
            for name, each in scores.items()
        }
    if len(scores) > 1:
        summary["comparisons"] = _comparisons(scores)
    if options.statistics:
        summary["statistics"] = _statistics(options, evaluation)
    _print(summary)
    _write(options, evaluation, scores, summary)
    return 0 if computed else 1


def _comparisons(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Compare every two result files in every metric that can be resampled."""
    return [
        {
            "first": first,
            "second": second,
            "metric": metric,
            "difference": scores[second].corpus[metric] - scores[first].corpus[metric],
            "p": paired_test(scores[first], scores[second], metric),
        }
        for first, second in combinations(scores, 2)
        for metric in resampled_metrics(scores[first])
    ]


def _statistics(options: argparse.Namespace, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    training = None
    if options.training_captions:
        images = read_annotations(options.training_captions).images
        training = [tokenize(caption) for image in images for caption in image.captions]
    found = {
        name: describe([tokenize(caption) for caption in captions.values()], training)
        for name, captions in evaluation.hypotheses.items()
    }
    of_people = [tokenize(text) for texts in evaluation.references.values() for text in texts]
    found["references"] = describe(of_people, training)
    if options.n_best:
        found["n-best"] = {"self_bleu-4": self_bleu(_read_n_best(options.n_best))}
    return found


def _read_n_best(path: Path) -> list[list[list[str]]]:
    candidates = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            captions = parse_json(line, f"{path}: line {number}")["captions"]
            candidates.append([tokenize(caption) for caption in captions])
        except (KeyError, TypeError, AttributeError):
            raise DataError(
                f"{path}: line {number}: an object with 'captions', a list of texts, was expected"
            ) from None
    return candidates


def _print(summary: Mapping[str, Any]) -> None:
    for name, corpus in summary["scores"].items():
        if len(summary["scores"]) > 1:
            print(name)
        for metric, value in corpus.items():
            interval = summary.get("confidence_95", {}).get(name, {}).get(metric)
            spread = f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            print(f"{metric:8}{value:.4f}{spread}")
    for row in summary.get("comparisons", ()):
        print(
            f"{row['second']} - {row['first']}  {row['metric']:8}{row['difference']:+.4f}"
            f"  p = {row['p']:.3f}"
        )
    for name, values in summary.get("statistics", {}).items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    print(summary["signature"])


def _write(
    options: argparse.Namespace,
    evaluation: Evaluation,
    scores: Mapping[str, Scores],
    summary: Mapping[str, Any],
) -> None:
    if options.output:
        only = next(iter(scores.values())).corpus if len(scores) == 1 else {}
        write_json(options.output, {**only, **summary})
    if options.per_image:
        write_per_image(options.per_image, evaluation, scores)
    if options.save_frequencies:
        tokens = [[tokenize(text) for text in texts] for texts in evaluation.references.values()]
        DocumentFrequencies.of(tokens).save(options.save_frequencies)
    if options.plot or options.report:
        from captioner.metrics.report import write_plot, write_report

        if options.plot:
            write_plot(options.plot, scores)
        if options.report:
            write_report(
                options.report,
                evaluation,
                scores,
                summary,
                options.images,
                not options.link_images,
            )
    if options.wandb:
        _log(options, summary)


def _log(options: argparse.Namespace, summary: Mapping[str, Any]) -> None:
    """Log scores to W&B; offline where the user isn't logged in."""
    import wandb

    from captioner.config import WandbConfig
    from captioner.training.tracking import Tracker

    folder = options.output.parent if options.output else Path.cwd()
    tracker = Tracker(WandbConfig(project=options.wandb), {}, folder, options.wandb_run)
    several = len(summary["scores"]) > 1
    values: dict[str, Any] = {
        f"evaluation/{name}/{metric}" if several else f"evaluation/{metric}": value
        for name, corpus in summary["scores"].items()
        for metric, value in corpus.items()
    }
    values["evaluation/signature"] = summary["signature"]
    if options.report:
        values["evaluation/report"] = wandb.Html(str(options.report), inject=False)
    tracker.log(0, values)
    tracker.finish()
