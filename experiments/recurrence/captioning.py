"""Captions by each cell, tuned alike: how word vectors begin, the learning rate, the features."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from captioner.data.dataset import pad
from captioner.data.predictions import read_predictions
from captioner.data.vocabulary import BOS
from captioner.files import atomic_write
from captioner.metrics.report import label_lines, new_figure
from captioner.metrics.scores import Scores, score
from captioner.metrics.significance import confidence_interval, paired_test
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import load_checkpoint
from captioner.progress import log_line
from captioner.training.gradient_flow import gradient_norms
from captioner.training.run import train
from captioner.training.tracking import read_log
from experiments.recurrence.captions import Captions, experiment, load_captions, pooled_features
from experiments.recurrence.pictures import COLOURS, Record, draw_dots, groups, mean
from experiments.recurrence.study import Setting

METRICS = ("BLEU-4", "CIDEr-D")
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# Word vectors begin uniformly up to this: their rms is 0.058 and 1.
SCALES = (0.1, 1.732)
RATES = (1e-3, 2e-3, 4e-3)
WORDS = 10  # of captions in which the flow of gradients is measured


def captioning(setting: Setting) -> list[Record]:
    """One to many: photograph to caption, by each cell, tuned alike, on Flickr8k.

    Show and Tell of 256 units on a frozen MobileNetV2 (`captioning.toml`): six epochs, captions of
    the validation split found by a beam of 3, scores of the best epoch by BLEU-4. Each cell is
    tried with three learning rates and two starts of its word vectors (`embedding_scale`: uniform
    up to 0.1, which is an rms of 0.06 beside an image that comes in at 0.5; or up to 1.732, an rms
    of 1), one seed. Then each cell's best by CIDEr-D has three seeds, with the image's features as
    they are and normalised (`decoder.feature_norm`). `low` and `high` are the 95% interval over
    images (bootstrap), a mean over seeds; `p against lstm` is that of a paired randomisation test
    on CIDEr-D (10,000 permutations: 0.0001 is the least), seed by seed. Losses are cross-entropies
    under teacher forcing in evaluation mode, without label smoothing, of all captions of the
    validation images and of as many training images. `image share`: of the gradient of a caption's
    tenth word by the whole state after it, the share that reaches the state after the image.
    """
    grid = list(
        product(
            setting.pick(CELLS, ("lstm", "rnn_tanh")),
            SCALES,
            setting.pick(RATES, (1e-3,)),
        )
    )
    records = [_run(setting, cell, scale, rate, "plain", 0) for cell, scale, rate in grid]
    for (cell,), of_cell in groups(list(records), ("cell",)).items():
        best = max(of_cell, key=lambda record: record["CIDEr-D"])
        start = best["embedding_scale"], best["rate"]
        for features, seed in product(("plain", "normalised"), setting.seeds):
            if (features, seed) != ("plain", 0):
                records.append(_run(setting, cell, *start, features, seed))
    _compare(setting, _best(records))
    return records


def _run(
    setting: Setting, cell: str, scale: float, rate: float, features: str, seed: int
) -> Record:
    record: Record = {
        "cell": cell,
        "embedding_scale": scale,
        "rate": rate,
        "features": features,
        "seed": seed,
    }
    folder = _folder(setting, record)
    log_line(f"captioning: {folder.name}")
    _train(
        setting,
        folder,
        f"decoder.cell={cell}",
        f"decoder.embedding_scale={scale}",
        f"decoder.feature_norm={str(features == 'normalised').lower()}",
        f"training.learning_rate={rate}",
        f"training.seed={seed}",
    )
    corpus = _score(setting, folder).corpus
    epochs = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "epoch"]
    return {
        **record,
        **{metric: corpus[metric] for metric in METRICS},
        "train_seconds": sum(line["train_seconds"] for line in epochs),
        **_look_inside(setting, load_checkpoint(folder / "best")),
    }


def _folder(setting: Setting, record: Record) -> Path:
    parts = [record["cell"], f"{record['embedding_scale']:g}", f"{record['rate']:g}"]
    name = "_".join([*parts, record["features"], str(record["seed"])])
    return setting.output / "runs" / "captioning" / name


def _train(setting: Setting, folder: Path, *settings: str) -> None:
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
        overrides += ["training.epochs=1", "data.min_word_count=1"]
        overrides += ["decoder.hidden_size=32", "decoder.embedding_size=32"]
    train(experiment(setting, *overrides), folder, resume=True, or_start=True)


def _score(setting: Setting, folder: Path) -> Scores:
    """Return the scores of a run's best checkpoint on the validation split."""
    _, val, _ = load_captions(setting)
    hypotheses = read_predictions(folder / "best" / "val_predictions.json")
    return score(hypotheses, val.dataset.references, METRICS)


def _look_inside(setting: Setting, model: CaptioningModel) -> Record:
    """Return the losses of training and validation captions, and the flow of gradients."""
    train, val, _ = load_captions(setting)
    count = len(val.token_ids)
    features = pooled_features(setting, val.dataset).unsqueeze(1)
    seen = pooled_features(setting, train.dataset.select(range(count))).unsqueeze(1)
    flow = _flow(model, features, val)
    return {
        "train_loss": _loss(model, seen, train.token_ids[:count]),
        "val_loss": _loss(model, features, val.token_ids),
        "flow": flow,
        "image_share": flow[-1],
    }


@torch.no_grad()
def _loss(model: CaptioningModel, features: Tensor, captions: Sequence[list[list[int]]]) -> float:
    """Return the mean loss of a token, in evaluation mode."""
    total, tokens = 0.0, 0
    for start in range(0, len(captions), 64):
        rows = slice(start, start + 64)
        output = model.decoder.teacher_forcing(features[rows], pad(captions[rows]))
        total += float(cross_entropy(output.logits, output.targets, reduction="sum"))
        tokens += len(output.targets)
    return total / tokens


def _flow(model: CaptioningModel, features: Tensor, captions: Captions) -> list[float]:
    """Return which share of the gradient of the tenth word's loss reaches each earlier state.

    All captions are cut to ten words, so that a distance is the same in each, and the word is a
    word, not the end. The share is by the whole state, 1 after the tenth step, last that of the
    state after the image.
    """
    chosen = [
        (image, [BOS, *caption[:WORDS]])
        for image, of_image in enumerate(captions.token_ids)
        for caption in of_image
        if len(caption) >= WORDS
    ][:256]
    images, rows = zip(*chosen, strict=True)
    states: list[tuple[Tensor, ...]] = []
    output = model.decoder.teacher_forcing(
        features[list(images)], torch.tensor(rows).unsqueeze(1), trace=states
    )
    losses = cross_entropy(output.logits, output.targets, reduction="none")
    last = losses[output.positions[:, 2] == WORDS - 1]
    layers = list(zip(*(model.decoder.layer_states(state) for state in states), strict=True))
    norms = gradient_norms(last.sum(), layers)[0]["state"][::-1]
    return [norm / norms[0] for norm in norms]


def _compare(setting: Setting, records: Sequence[Record]) -> None:
    """Add to records of best settings their intervals, and the tests against the LSTM's."""
    scores: dict[tuple[str, int], Scores] = {}
    for record in records:
        of_run = scores[record["features"], record["seed"]] if record["cell"] != "lstm" else None
        found = _score(setting, _folder(setting, record))
        for metric in METRICS:
            ends = confidence_interval(found, metric, setting.pick(1000, 50))
            record |= dict(zip((f"{metric}_low", f"{metric}_high"), ends, strict=True))
        if of_run is None:
            scores[record["features"], record["seed"]] = found
        else:
            p = paired_test(of_run, found, "CIDEr-D", setting.pick(10_000, 50))
            record["p_against_lstm"] = f"{p:.4f}"


def _best(records: Sequence[Record]) -> list[Record]:
    """Return the runs of the settings of each cell that have several seeds, cell by cell."""
    chosen: list[Record] = []
    for _, of_cell in groups(records, ("cell",)).items():
        start = {(r["embedding_scale"], r["rate"]) for r in of_cell if r["features"] != "plain"}
        of_start = [r for r in of_cell if (r["embedding_scale"], r["rate"]) in start]
        chosen += sorted(of_start, key=lambda record: record["features"], reverse=True)
    return chosen


def tuned(records: Sequence[Record], features: str) -> list[Record]:
    """Return the runs of each cell's best setting, all seeds, with such features."""
    return [record for record in _best(records) if record["features"] == features]


def draw_captioning(records: Sequence[Record]) -> Any:
    """Draw CIDEr-D over the rate for each start, one seed; below, its best, and gradients."""
    figure = new_figure(2, 2, 5.0, 3.2)
    first = [r for r in records if r["features"] == "plain" and r["seed"] == 0]
    top = 1.1 * max(record["CIDEr-D"] for record in records)
    for place, ((scale,), of_scale) in enumerate(groups(first, ("embedding_scale",)).items()):
        axes = figure.add_subplot(2, 2, place + 1)
        rates = sorted({record["rate"] for record in of_scale})
        axes.set(title=f"word vectors up to {scale:g}", xscale="log")
        axes.set(xlim=(rates[0] / 1.2, rates[-1] * 2), ylim=(0, top))
        axes.set(xlabel="learning rate", ylabel="CIDEr-D")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        lines = {}
        for (cell,), of_cell in groups(of_scale, ("cell",)).items():
            values = [mean(r, "CIDEr-D") for r in groups(of_cell, ("rate",)).values()]
            (lines[cell],) = axes.plot(rates, values, marker=".", color=COLOURS[cell])
        label_lines(axes, lines)
    best = [{**r, "run": f"{r['cell']}, {r['features']} features"} for r in _best(records)]
    axes = figure.add_subplot(2, 2, 3)
    draw_dots(axes, best, "run", "CIDEr-D", "CIDEr-D of each cell's best setting")
    _draw_flow(figure.add_subplot(2, 2, 4), tuned(records, "normalised"))
    return figure


def _draw_flow(axes: Any, records: Sequence[Record]) -> None:
    lines = {}
    for (cell,), of_cell in groups(records, ("cell",)).items():
        for record in of_cell:
            (lines[cell],) = axes.plot(record["flow"], color=COLOURS[cell], linewidth=1.0)
    axes.set(yscale="log", xlabel="steps back from the tenth word", xlim=(0, 1.3 * WORDS))
    axes.set(ylabel="share of the gradient", title="normalised features")
    label_lines(axes, lines)
