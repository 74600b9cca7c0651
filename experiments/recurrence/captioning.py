"""Captions by each cell, under the same budget."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from captioner.data.predictions import read_predictions
from captioner.files import atomic_write
from captioner.metrics.report import label_lines, new_figure
from captioner.metrics.scores import Scores, score
from captioner.metrics.significance import confidence_interval, paired_test
from captioner.progress import log_line
from captioner.training.gradient_flow import logged_flow
from captioner.training.run import train
from captioner.training.tracking import read_log
from experiments.recurrence.captions import experiment, load_captions
from experiments.recurrence.pictures import COLOURS, Record, draw_dots, groups
from experiments.recurrence.study import Setting

METRICS = ("BLEU-4", "CIDEr-D")


def captioning(setting: Setting) -> list[Record]:
    """One to many: photograph to caption, by each cell, on Flickr8k.

    Show and Tell of 256 units on a frozen MobileNetV2 (`captioning.toml`): the same epochs,
    batches and learning rate for each cell, captions of the validation split found by a beam of
    3, scores of the best epoch by BLEU-4. `low` and `high` are the 95% interval over images
    (bootstrap), a mean over seeds. `p against lstm` is the largest of a paired randomisation test
    over the seeds, on CIDEr-D. `end to image` is the share of the gradient of the caption's last
    word that reaches the state after the image, measured in the last epoch. Runs are kept in
    `runs/` below the output folder and go on where they were stopped.
    """
    cells = setting.pick(("lstm", "gru", "rnn_tanh", "rnn_relu"), ("lstm", "rnn_tanh"))
    records: list[Record] = []
    scores: dict[tuple[str, int], Scores] = {}
    for cell, seed in product(cells, setting.seeds):
        log_line(f"captioning: {cell}, seed {seed}")
        folder = setting.output / "runs" / f"{cell}_{seed}"
        train_run(setting, folder, f"decoder.cell={cell}", f"training.seed={seed}")
        scores[cell, seed] = run_scores = score_run(setting, folder)
        record: Record = {"cell": cell, "seed": seed}
        for metric in METRICS:
            low, high = confidence_interval(run_scores, metric, setting.pick(1000, 50))
            record |= {
                metric: run_scores.corpus[metric],
                f"{metric}_low": low,
                f"{metric}_high": high,
            }
        record["p_against_lstm"] = (
            None if cell == "lstm" else paired_test(scores["lstm", seed], run_scores, "CIDEr-D")
        )
        records.append(record | _of_log(folder))
    for _, of_cell in groups(records, ("cell",)).items():
        chances = [record["p_against_lstm"] for record in of_cell]
        for record in of_cell:
            record["p_against_lstm"] = None if None in chances else max(chances)
    return records


def draw_captioning(records: Sequence[Record]) -> Any:
    """Draw the scores, and the flow of gradients in the last epoch."""
    figure = new_figure(3, 1, 3.6, 2.8)
    for place, metric in enumerate(METRICS):
        draw_dots(figure.add_subplot(1, 3, place + 1), records, "cell", metric)
    axes = figure.add_subplot(1, 3, 3)
    lines = {}
    for (cell,), of_cell in groups(records, ("cell",)).items():
        for record in sorted(of_cell, key=lambda record: len(record["flow"])):
            shares = [norm / record["flow"][0] for norm in record["flow"]]
            (lines[cell],) = axes.plot(shares, color=COLOURS[cell], linewidth=1.0)
    axes.set(yscale="log", xlabel="steps back from the last word", ylabel="share of the gradient")
    axes.set_xlim(0, 1.35 * max(len(record["flow"]) - 1 for record in records))
    label_lines(axes, lines)
    return figure


def train_run(setting: Setting, folder: Path, *settings: str) -> None:
    """Train ``captioning.toml`` with some settings, or go on where that was stopped."""
    overrides = [*settings, f"wandb.mode={setting.wandb}"]
    overrides += [f"wandb.name={folder.name}", "wandb.project=captioner-recurrence"]
    if setting.quick:
        listed = dict(zip(("train", "val"), load_captions(setting)[:2], strict=True))
        for split, captions in listed.items():
            path = (setting.output / "runs" / f"{split}.txt").resolve()
            with atomic_write(path) as file:
                file.writelines(f"{image.name}\n" for image in captions.dataset.paths)
            overrides.append(f"data.{split}_split={path}")
        overrides += [
            "training.epochs=1",
            "training.gradient_flow_every=1",
            "data.min_word_count=1",
        ]
        overrides += ["decoder.hidden_size=32", "decoder.embedding_size=32"]
    train(experiment(setting, *overrides), folder, resume=True, or_start=True)


def score_run(setting: Setting, folder: Path) -> Scores:
    """Return the scores of a run's best checkpoint on the validation split."""
    _, val, _ = load_captions(setting)
    hypotheses = read_predictions(folder / "best" / "val_predictions.json")
    return score(hypotheses, val.dataset.references, METRICS)


def _of_log(folder: Path) -> Record:
    """Return what a run's log says: time, loss, and the flow of gradients in the last epoch."""
    lines = read_log(folder / "log.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    flow = logged_flow(lines)[-1]["end"][0]["state"]
    return {
        "train_seconds": sum(line["train_seconds"] for line in epochs),
        "loss": epochs[-1]["loss"],
        "end_to_image": flow[-1] / flow[0],
        "flow": flow,
    }
