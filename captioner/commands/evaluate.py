r"""Score captions against references: BLEU-1 to BLEU-4, and the other COCO metrics when asked.

The numbers are those of the official COCO caption evaluation, without Java (METEOR and SPICE
need it). CIDEr-D is what the official tool prints as "CIDEr"; CIDEr is another score.

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

from captioner.cli import HelpFormatter, Parser, command, program_name
from captioner.data.annotations import read_annotations
from captioner.data.tokenizer import tokenize
from captioner.errors import DataError, UsageError
from captioner.files import write_json
from captioner.metrics.diversity import describe, self_bleu
from captioner.metrics.evaluation import (
    Evaluation,
    read_evaluation,
    read_n_best,
    signature,
    write_per_image,
)
from captioner.metrics.report import (
    find_missing_images,
    new_figure,
    plot_format,
    write_plot,
    write_report,
)
from captioner.metrics.scores import DocumentFrequencies, Scores, metric_names, score
from captioner.metrics.significance import confidence_interval, paired_test, resampled_metrics
from captioner.progress import log_line, print_line


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = Parser(
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
    add("--images", type=Path, help="folder of the images, for the page (with --report)")
    add("--link-images", action="store_true", help="link to the images, instead of copies in it")
    add("--wandb", metavar="PROJECT", help="log to a new run of this project in Weights & Biases")
    add("--wandb-run", metavar="ID", help="log to this run instead (with --wandb)")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    metrics = metric_names(options.metrics)
    _check_options(options, metrics)
    evaluation = read_evaluation(
        options.references, options.hypotheses, options.split, options.allow_missing
    )
    for note in (*evaluation.notes, *find_missing_images(evaluation, options.images)):
        log_line(f"warning: {note}")
    frequencies = DocumentFrequencies.load(options.frequencies) if options.frequencies else None
    statistics = _statistics(options, evaluation) if options.statistics else {}
    scores = {
        name: score(captions, evaluation.references, metrics, frequencies)
        for name, captions in evaluation.hypotheses.items()
    }
    computed = _keep_computed(scores)
    if not computed:
        raise DataError("no score could be computed")
    summary: dict[str, Any] = {
        "scores": {name: file_scores.corpus for name, file_scores in scores.items()},
        "images": len(evaluation.references),
        "references": sum(map(len, evaluation.references.values())),
        "signature": signature(evaluation, computed, frequencies),
    }
    if options.confidence:
        summary["confidence_95"] = {
            name: {
                metric: confidence_interval(file_scores, metric)
                for metric in resampled_metrics(file_scores)
            }
            for name, file_scores in scores.items()
        }
    if len(scores) > 1:
        summary["comparisons"] = _comparisons(scores)
    if statistics:
        summary["statistics"] = statistics
    _print(summary)
    _write(options, evaluation, scores, summary)
    return 0


def _check_options(options: argparse.Namespace, metrics: Sequence[str]) -> None:
    """Refuse, before anything is computed, what would have no effect or can't be done."""
    for name, needed in {
        "link_images": "images",
        "images": "report",
        "training_captions": "statistics",
        "n_best": "statistics",
        "wandb_run": "wandb",
    }.items():
        if getattr(options, name) and not getattr(options, needed):
            flag, needed_flag = (f"--{word.replace('_', '-')}" for word in (name, needed))
            raise UsageError(f"{flag} has no effect without {needed_flag}")
    uses_cider = {"CIDEr-D", "CIDEr"} & set(metrics)
    if options.frequencies and not uses_cider:
        raise UsageError("--frequencies has no effect without CIDEr-D or CIDEr in --metrics")
    if options.images and not options.images.is_dir():
        raise DataError(f"--images: {options.images}: no such folder")
    if options.plot:
        plot_format(options.plot)
    if options.plot or options.report:
        new_figure(1, 1)  # needs matplotlib
    if "CIDEr" in metrics:
        log_line(
            "note: CIDEr is the paper's score without clipping and length penalty; what the "
            "official COCO tool prints as 'CIDEr' is CIDEr-D"
        )


def _keep_computed(scores: Mapping[str, Scores]) -> list[str]:
    """Return the metrics that all result files have; say why the others are left out."""
    unavailable = {
        metric: reason
        for file_scores in scores.values()
        for metric, reason in file_scores.unavailable.items()
    }
    for metric, reason in unavailable.items():
        log_line(f"left out: {reason}")
        for file_scores in scores.values():
            file_scores.corpus.pop(metric, None)
            file_scores.per_image.pop(metric, None)
    return list(next(iter(scores.values())).corpus)


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
        annotations = read_annotations(options.training_captions)
        for note in annotations.notes:
            log_line(f"warning: {note}")
        training = [tokenize(text) for image in annotations.images for text in image.captions]
    statistics = {
        name: describe([tokenize(caption) for caption in captions.values()], training)
        for name, captions in evaluation.hypotheses.items()
    }
    references = [tokenize(text) for texts in evaluation.references.values() for text in texts]
    statistics["references"] = describe(references, training)
    if options.n_best:
        candidates, notes = read_n_best(
            options.n_best, evaluation, options.references, options.allow_missing
        )
        for note in notes:
            log_line(f"warning: {note}")
        statistics["n-best"] = {"self_bleu-4": self_bleu(candidates)}
    return statistics


def _print(summary: Mapping[str, Any]) -> None:
    for name, corpus in summary["scores"].items():
        if len(summary["scores"]) > 1:
            print_line(name)
        for metric, value in corpus.items():
            interval = summary.get("confidence_95", {}).get(name, {}).get(metric)
            spread = f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            print(f"{metric:8}{value:.4f}{spread}")
    for row in summary.get("comparisons", ()):
        print_line(
            f"{row['second']} - {row['first']}  {row['metric']:8}{row['difference']:+.4f}"
            f"  p = {row['p']:.3f}"
        )
    for name, values in summary.get("statistics", {}).items():
        print_line(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    print_line(summary["signature"])


def _write(
    options: argparse.Namespace,
    evaluation: Evaluation,
    scores: Mapping[str, Scores],
    summary: Mapping[str, Any],
) -> None:
    if options.output:
        corpus = next(iter(scores.values())).corpus if len(scores) == 1 else {}
        write_json(options.output, {**corpus, **summary})
    if options.per_image:
        write_per_image(options.per_image, evaluation, scores)
    if options.save_frequencies:
        tokens = [[tokenize(text) for text in texts] for texts in evaluation.references.values()]
        DocumentFrequencies.of(tokens).save(options.save_frequencies)
    if options.plot:
        write_plot(options.plot, scores)
    if options.report:
        embed = not options.link_images
        write_report(options.report, evaluation, scores, summary, options.images, embed)
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
