"""The shapes of sequence problems, each on real captions or photographs, beside feed-forward."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from captioner.data.vocabulary import BOS, EOS, PAD
from captioner.metrics.report import label_lines, new_figure
from captioner.models.recurrent import RecurrentStack
from captioner.models.recurrent_cells import CELLS
from experiments.recurrence.captions import load_captions, pad_rows, pooled_features
from experiments.recurrence.pictures import COLOURS, GREY, Record, colour_of, draw_dots
from experiments.recurrence.study import LastStep, Setting, batch_of, train_models

SHOWN = 150  # forecasts that are kept for the picture
DOGS = {
    "dog",
    "dogs",
    "puppy",
    "puppies",
    "poodle",
    "labrador",
    "greyhound",
    "terrier",
    "dalmatian",
}


# --- one to one -----------------------------------------------------------------------------------


class _OneStep(nn.Module):
    def __init__(self, cell: str, width: int) -> None:
        super().__init__()
        self.read = LastStep(1, RecurrentStack(cell, width, 128))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x.unsqueeze(1))


def _feed_forward(width: int, units: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, units), nn.Tanh(), nn.Linear(units, 1))


def one_to_one(setting: Setting) -> list[Record]:
    """One to one: is there a dog in this photograph?

    From the pooled features of a frozen MobileNetV2; there is a dog where two or more of the five
    captions name one. Nothing here has an order: a recurrence of a single step is a feed-forward
    layer. The first row always gives the commoner answer; logistic regression is the baseline; the
    wide feed-forward layer has as many weights as the LSTM.
    """
    train, val, _ = load_captions(setting)
    x, x_val = (pooled_features(setting, split.dataset) for split in (train, val))
    centre, spread = x.mean(0), x.std(0) + 1e-6
    x, x_val = (x - centre) / spread, (x_val - centre) / spread
    y, y_val = (
        torch.tensor([_has_dog(captions) for captions in split.dataset.captions])
        for split in (train, val)
    )
    width = x.shape[1]
    models: dict[str, Callable[[], nn.Module]] = {
        "logistic regression": lambda: nn.Linear(width, 1),
        "feed-forward": lambda: _feed_forward(width, 128),
        "feed-forward, wide": lambda: _feed_forward(width, 563),
        **{f"{cell}, one step": partial(_OneStep, cell, width) for cell in CELLS},
    }

    def loss_of(model: nn.Module, random: np.random.Generator) -> Tensor:
        rows = batch_of(len(x), random, 256)
        return binary_cross_entropy_with_logits(model(x[rows]).squeeze(1), y[rows])

    def scores_of(model: nn.Module) -> dict[str, float]:
        return _binary_scores(model(x_val).squeeze(1) > 0, y_val > 0)

    always = _binary_scores(torch.full_like(y_val, float(y.mean() > 0.5)) > 0, y_val > 0)
    records: list[Record] = [{"model": "the commoner answer", "seed": 0, "parameters": 0, **always}]
    steps = setting.pick(200, 5)
    return records + train_models("one_to_one", setting, models, loss_of, scores_of, steps, 1e-3)


def _has_dog(captions: Sequence[str]) -> float:
    return float(sum(bool(DOGS & set(text.lower().split())) for text in captions) >= 2)


def _binary_scores(predicted: Tensor, true: Tensor) -> dict[str, float]:
    hits = float((predicted & true).sum())
    return {
        "accuracy": float((predicted == true).float().mean()),
        "f1": 2 * hits / max(1.0, float(predicted.sum() + true.sum())),
    }


# --- many to one ----------------------------------------------------------------------------------


class _Reader(nn.Module):
    """Word vectors, a recurrence, an answer from its last h; or, without a cell, from their sum."""

    def __init__(self, cell: str, vocabulary_size: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=PAD)
        self.read: nn.Module = (
            LastStep(1, RecurrentStack(cell, width, width))
            if cell
            else nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        )
        self.cell = cell

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        words = self.embedding(token_ids)
        answer = self.read(words, lengths) if self.cell else self.read(words.sum(1))
        return answer.squeeze(1)


def many_to_one(setting: Setting) -> list[Record]:
    """Many to one: is this caption in its true order, or shuffled?

    Each caption is read once as written and once with its words shuffled. A bag of words sees no
    difference between the two: whatever it learns, it is right in exactly half of them.
    """
    train, val, vocabulary = load_captions(setting)
    captions, held_out = (
        [caption for caption in split.flat if len(set(caption)) > 3] for split in (train, val)
    )
    held_out = held_out[: setting.pick(2000, 50)]
    fixed = np.random.default_rng(0)
    shuffled = [_shuffle(caption, fixed) for caption in held_out]
    models: dict[str, Callable[[], nn.Module]] = {
        "bag of words": lambda: _Reader("", len(vocabulary)),
        **{cell: partial(_Reader, cell, len(vocabulary)) for cell in CELLS},
    }

    def loss_of(model: nn.Module, random: np.random.Generator) -> Tensor:
        chosen = [captions[i] for i in batch_of(len(captions), random, 64)]
        rows = chosen + [_shuffle(caption, random) for caption in chosen]
        truth = torch.tensor([1.0] * 64 + [0.0] * 64)
        return binary_cross_entropy_with_logits(model(*pad_rows(rows)), truth)

    def scores_of(model: nn.Module) -> dict[str, float]:
        true, false = (model(*pad_rows(rows)) > 0 for rows in (held_out, shuffled))
        return {"accuracy": float(torch.cat([true, ~false]).float().mean())}

    return train_models("many_to_one", setting, models, loss_of, scores_of, setting.pick(500, 5))


def _shuffle(caption: Sequence[int], random: np.random.Generator) -> list[int]:
    """Return the words in another order."""
    while True:
        shuffled = random.permutation(caption).tolist()
        if shuffled != list(caption):
            return shuffled


# --- many to many, in step ------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Predicts the next word after each word.

    Args:
        hidden: Makes what stands between word vectors and output, of their width twice: a
            recurrence, or what knows the last word alone.
        vocabulary_size: Of the captions.
        width: Of both.
    """

    def __init__(
        self, hidden: Callable[[int, int], nn.Module], vocabulary_size: int, width: int = 128
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=PAD)
        self.hidden = hidden(width, width)
        self.output = nn.Linear(width, vocabulary_size)

    def loss(self, token_ids: Tensor, reduction: str = "mean") -> Tensor:
        """Return the cross-entropy of captions from BOS to EOS, (rows, T + 1)."""
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
        real = targets != PAD
        hidden = self.hidden(self.embedding(inputs))
        return cross_entropy(self.output(hidden[real]), targets[real], reduction=reduction)


def next_word(setting: Setting) -> list[Record]:
    """Many to many, in step: the next word after each word, by perplexity.

    Language models of the captions, without photographs, two passes over the training captions.
    The unigram and bigram models count (the bigram is mixed with the unigram, weight 0.8); the
    feed-forward one learns from the last word alone.
    """
    captions, held_out, size = language_captions(setting, setting.pick(5000, 50))
    models: dict[str, Callable[[], nn.Module]] = {
        "feed-forward": partial(LanguageModel, _last_word, size),
        **{
            cell: partial(LanguageModel, partial(RecurrentStack, cell, return_sequences=True), size)
            for cell in CELLS
        },
    }

    def loss_of(model: nn.Module, random: np.random.Generator) -> Tensor:
        assert isinstance(model, LanguageModel)
        rows = [captions[i] for i in batch_of(len(captions), random, 64)]
        return model.loss(pad_rows(rows)[0])

    def scores_of(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, LanguageModel)
        return {"perplexity": perplexity(model, held_out)}

    records: list[Record] = [
        {"model": name, "seed": 0, "parameters": None, "perplexity": counted}
        for name, counted in count_perplexities(captions, held_out, size).items()
    ]
    steps = setting.pick(2 * len(captions) // 64, 5)
    return records + train_models("next_word", setting, models, loss_of, scores_of, steps)


def _last_word(width: int, units: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, units), nn.ReLU())


def language_captions(setting: Setting, most: int) -> tuple[list[list[int]], list[list[int]], int]:
    """Return captions from BOS to EOS, to train and (so many) to test, and the vocabulary's size.

    Those to test are sorted by length.
    """
    train, val, vocabulary = load_captions(setting)
    captions, held_out = (
        [[BOS, *caption, EOS] for caption in split.flat] for split in (train, val)
    )
    return captions, sorted(held_out[:most], key=len), len(vocabulary)


def perplexity(model: LanguageModel, held_out: Sequence[list[int]]) -> float:
    """Return the perplexity of captions from BOS to EOS, sorted by length."""
    tokens = sum(len(caption) - 1 for caption in held_out)
    parts = [list(held_out[i : i + 250]) for i in range(0, len(held_out), 250)]
    total = sum(float(model.loss(pad_rows(part)[0], "sum")) for part in parts)
    return math.exp(total / tokens)


def count_perplexities(
    captions: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], size: int
) -> dict[str, float]:
    """Return the perplexity of a unigram and of a bigram model that count words."""
    singles = Counter(word for caption in captions for word in caption[1:])
    pairs = Counter(pair for caption in captions for pair in pairwise(caption))
    firsts = Counter(word for caption in captions for word in caption[:-1])
    total = sum(singles.values())
    one, two, tokens = 0.0, 0.0, 0
    for caption in held_out:
        for before, word in pairwise(caption):
            alone = (singles[word] + 1) / (total + size)
            together = pairs[before, word] / max(1, firsts[before])
            one, two, tokens = (
                one - math.log(alone),
                two - math.log(0.8 * together + 0.2 * alone),
                tokens + 1,
            )
    return {"unigram": math.exp(one / tokens), "bigram": math.exp(two / tokens)}


# --- numbers --------------------------------------------------------------------------------------


def mackey_glass(length: int, seed: int, delay: int = 17) -> np.ndarray:
    """Return a chaotic series, x' = 0.2 x(t-17) / (1 + x(t-17)^10) - 0.1 x (Mackey, Glass 1977).

    Euler's method, steps of 0.1, every tenth kept; the first 300 are thrown away.
    """
    fine = 10
    random = np.random.default_rng(seed)
    x = np.empty((length + 300) * fine + delay * fine)
    x[: delay * fine] = 1.2 + 0.2 * (random.random(delay * fine) - 0.5)
    for t in range(delay * fine, len(x)):
        late = x[t - delay * fine]
        x[t] = x[t - 1] + (0.2 * late / (1 + late**10) - 0.1 * x[t - 1]) / fine
    return x[delay * fine :: fine][300:]


def forecasts(length: int, window: int, ahead: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return windows of the series and the value ``ahead`` steps after each, to train and val."""
    series = mackey_glass(length, seed=0)
    series = (series - series.mean()) / series.std()
    views = np.lib.stride_tricks.sliding_window_view(series, window + ahead)
    x = torch.from_numpy(views[:, :window].copy()).float()
    y = torch.from_numpy(views[:, -1].copy()).float()
    cut = len(x) * 3 // 4
    return x[:cut], y[:cut], x[cut + window + ahead :], y[cut + window + ahead :]


def time_series(setting: Setting) -> list[Record]:
    """Many to one, with numbers: forecast of a chaotic time series.

    The Mackey-Glass series: 40 values are read, the value 20 steps later is forecast. `error` is
    the root mean squared error as a share of the standard deviation. The linear model is least
    squares on the same 40 values; the feed-forward one has them all at once too, so that order
    isn't hidden from it.
    """
    window = 40
    x, y, x_val, y_val = forecasts(setting.pick(6000, 800), window, ahead=20)

    def error(forecast: Tensor) -> Record:
        shown = [round(value, 4) for value in forecast[:SHOWN].tolist()]
        return {"error": float((forecast - y_val).square().mean().sqrt()), "forecast": shown}

    ones, ones_val = (torch.cat([part, torch.ones(len(part), 1)], 1) for part in (x, x_val))
    linear = torch.linalg.lstsq(ones.double(), y.double().unsqueeze(1)).solution.float()
    records: list[Record] = [
        {"model": name, "seed": 0, "parameters": weights, **error(forecast)}
        for name, weights, forecast in (
            ("the mean", 0, torch.zeros_like(y_val)),
            ("the last value", 0, x_val[:, -1]),
            ("linear", window + 1, (ones_val @ linear).squeeze(1)),
        )
    ]
    records[0]["truth"] = [round(value, 4) for value in y_val[:SHOWN].tolist()]
    models: dict[str, Callable[[], nn.Module]] = {
        "feed-forward": lambda: nn.Sequential(
            nn.Linear(window, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        ),
        **{cell: partial(_Numbers, cell) for cell in CELLS},
    }

    def loss_of(model: nn.Module, random: np.random.Generator) -> Tensor:
        rows = batch_of(len(x), random, 64)
        return mse_loss(model(x[rows]).squeeze(1), y[rows])

    def scores_of(model: nn.Module) -> Record:
        return error(model(x_val).squeeze(1))

    steps = setting.pick(1000, 5)
    return records + train_models("time_series", setting, models, loss_of, scores_of, steps, 3e-3)


def draw_time_series(records: Sequence[Record]) -> Any:
    """Draw the errors, then forecasts of the first seed beside the truth, and what they miss."""
    figure = new_figure(2, 1, 5.0, 4.0)
    grid = figure.add_gridspec(2, 2)
    axes = figure.add_subplot(grid[:, 0])
    draw_dots(axes, records, "model", "error", "root mean squared error / standard deviation")
    above, below = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    truth = records[0]["truth"]
    first = {record["model"]: record["forecast"] for record in records if not record["seed"]}
    lines = {"truth": above.plot(truth, color="0.65", linewidth=4)[0]}
    (lines["linear"],) = above.plot(first["linear"], "--", color=GREY)
    (lines["lstm"],) = above.plot(first["lstm"], color=COLOURS["lstm"])
    above.set(title="forecast of 20 steps ahead", ylabel="standard deviations")
    missed = {}
    # The three that are told apart whoever looks.
    for name, style in (("feed-forward", "--"), ("rnn_tanh", "-"), ("lstm", "-")):
        rest = [forecast - value for forecast, value in zip(first[name], truth, strict=True)]
        (missed[name],) = below.plot(rest, style, color=colour_of(name), linewidth=1.2)
    below.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    below.set(title="forecast − truth, enlarged", xlabel="step", ylabel="standard deviations")
    for frame, named in ((above, lines), (below, missed)):
        frame.set_xlim(0, 1.25 * SHOWN)
        label_lines(frame, named)
    return figure


class _Numbers(nn.Module):
    def __init__(self, cell: str) -> None:
        super().__init__()
        self.read = LastStep(1, RecurrentStack(cell, 1, 48))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x.unsqueeze(2))
