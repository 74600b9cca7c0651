"""Why one cell captions worse than another: how words begin, the learning rate, the features."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from captioner.data.dataset import pad
from captioner.metrics.report import label_lines, new_figure
from captioner.models.checkpoint import load_checkpoint
from captioner.progress import log_line
from experiments.recurrence.captioning import METRICS, score_run, train_run
from experiments.recurrence.captions import load_captions, pooled_features
from experiments.recurrence.pictures import COLOURS, Record, groups, mean
from experiments.recurrence.study import Setting

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# Word vectors begin uniformly up to this: their rms is 0.058 and 1.
SCALES = (0.1, 1.732)
RATES = (1e-3, 2e-3, 4e-3)


def captioning_starts(setting: Setting) -> list[Record]:
    """One to many, again: is it the cell, or how it was begun and trained?

    The study before gave all cells one learning rate, tuned for none, and word vectors that begin
    with an rms of 0.06 beside an image that comes in at 0.5. Here each cell has three rates and two
    starts of its word vectors (`embedding_scale`: uniform up to 0.1, or up to 1.732, which is an
    rms of 1), one seed; then each cell's best by CIDEr-D has three seeds, with the image's features
    as they are and normalised (`decoder.feature_norm`). Losses are cross-entropies under teacher
    forcing in evaluation mode, without label smoothing, of all captions of validation images and of
    as many training images.
    """
    grid = list(
        product(
            setting.pick(CELLS, ("lstm", "rnn_tanh")),
            SCALES,
            setting.pick(RATES, (1e-3,)),
        )
    )
    records = [_run(setting, cell, scale, rate, False, 0) for cell, scale, rate in grid]
    for (cell,), of_cell in groups(list(records), ("cell",)).items():
        best = max(of_cell, key=lambda record: record["CIDEr-D"])
        for norm, seed in product((False, True), setting.seeds):
            if norm or seed:
                start = best["embedding_scale"], best["rate"]
                records.append(_run(setting, cell, *start, norm, seed))
    return records


def _run(setting: Setting, cell: str, scale: float, rate: float, norm: bool, seed: int) -> Record:
    name = f"{cell}_{scale:g}_{rate:g}_{'norm' if norm else 'plain'}_{seed}"
    log_line(f"captioning_starts: {name}")
    folder = setting.output / "runs" / "starts" / name
    train_run(
        setting,
        folder,
        f"decoder.cell={cell}",
        f"decoder.embedding_scale={scale}",
        f"decoder.feature_norm={'true' if norm else 'false'}",
        f"training.learning_rate={rate}",
        f"training.seed={seed}",
        "training.gradient_flow_every=0",
    )
    scores = score_run(setting, folder)
    train_loss, val_loss = _losses(setting, folder)
    return {
        "cell": cell,
        "embedding_scale": scale,
        "rate": rate,
        "features": "normalised" if norm else "plain",
        "seed": seed,
        **{metric: scores.corpus[metric] for metric in METRICS},
        "train_loss": train_loss,
        "val_loss": val_loss,
    }


@torch.no_grad()
def _losses(setting: Setting, folder: Path) -> tuple[float, float]:
    """Return the mean loss of a word in training and validation captions, in evaluation mode."""
    model = load_checkpoint(folder / "best")
    train, val, _ = load_captions(setting)
    losses = []
    for split in (train, val):
        count = len(val.token_ids)
        features = pooled_features(setting, split.dataset.select(range(count)))
        total, tokens = 0.0, 0
        for start in range(0, count, 64):
            rows = slice(start, min(start + 64, count))
            output = model.decoder.teacher_forcing(
                features[rows].unsqueeze(1), pad(split.token_ids[rows])
            )
            total += float(cross_entropy(output.logits, output.targets, reduction="sum"))
            tokens += len(output.targets)
        losses.append(total / tokens)
    return losses[0], losses[1]


def draw_captioning_starts(records: Sequence[Record]) -> Any:
    """Draw CIDEr-D over the rate for each start, then each cell's best with all its seeds."""
    figure = new_figure(3, 1, 3.6, 3.2)
    first = [r for r in records if r["features"] == "plain" and r["seed"] == 0]
    top = 1.1 * max(record["CIDEr-D"] for record in records)
    for place, ((scale,), of_scale) in enumerate(groups(first, ("embedding_scale",)).items()):
        axes = figure.add_subplot(1, 3, place + 1)
        rates = sorted({record["rate"] for record in of_scale})
        axes.set(title=f"word vectors uniform up to {scale:g}", xscale="log", ylim=(0, top))
        axes.set(xlim=(rates[0] / 1.2, rates[-1] * 3), xlabel="learning rate", ylabel="CIDEr-D")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        lines = {}
        for (cell,), of_cell in groups(of_scale, ("cell",)).items():
            values = [mean(r, "CIDEr-D") for r in groups(of_cell, ("rate",)).values()]
            (lines[cell],) = axes.plot(rates, values, marker=".", color=COLOURS[cell])
        label_lines(axes, lines)
    axes = figure.add_subplot(1, 3, 3)
    names: list[str] = []
    for (cell, features), of_pair in groups(_best(records), ("cell", "features")).items():
        values = [record["CIDEr-D"] for record in of_pair]
        axes.plot(values, [len(names)] * len(values), ".", color=COLOURS[cell])
        axes.plot(mean(of_pair, "CIDEr-D"), len(names), "|", color=COLOURS[cell], markersize=12)
        names.append(f"{cell}, {features}")
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.invert_yaxis()
    axes.set(title="each cell's best, three seeds", xlabel="CIDEr-D")
    return figure


def _best(records: Sequence[Record]) -> list[Record]:
    """Return the runs of the settings of each cell that have several seeds, cell by cell."""
    chosen: list[Record] = []
    for _, of_cell in groups(records, ("cell",)).items():
        start = {(r["embedding_scale"], r["rate"]) for r in of_cell if r["features"] != "plain"}
        of_start = [r for r in of_cell if (r["embedding_scale"], r["rate"]) in start]
        chosen += sorted(of_start, key=lambda record: record["features"], reverse=True)
    return chosen
