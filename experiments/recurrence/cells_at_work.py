"""Cells at work: a photograph captioned over the epochs, gates over its words, single units."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from captioner.data.dataset import TrainingBatches, pad
from captioner.data.vocabulary import BOS, Vocabulary
from captioner.metrics.report import label_lines, new_figure
from captioner.models.captioning_model import generate, make_decoder
from captioner.models.decoder import Decoder
from captioner.models.inference_decoder import InferenceDecoder
from captioner.models.recurrent_cells import CELLS
from captioner.models.show_and_tell import ShowAndTell
from captioner.progress import log_line
from experiments.recurrence.captions import (
    Captions,
    experiment,
    load_captions,
    pooled_features,
    pooled_features_of,
)
from experiments.recurrence.pictures import COLOURS, Record, groups
from experiments.recurrence.study import HERE, Setting, fit

# Free photographs of scikit-image's package: camera (CC0), astronaut (NASA, public domain).
PHOTOGRAPHS = ("camera", "astronaut")
SENTENCE = "a man is taking a picture with a camera in a field"  # of the first of them
COLOURED = (
    SENTENCE,
    "two brown dogs are playing with a red ball in the snow",
    "a woman in an orange suit is smiling",
)
NUMBERS = frozenset(["two", "three", "four", "five", "six", "several", "many", "some"])
_OPENING = NUMBERS | frozenset(["a", "an", "the", "his", "her", "their", "its", "one", "another"])
_CLOSING_WORDS = """
    is are was were in on at of with by to from through over into near and while as that who which
    for under behind beside along across up down around other out off next
    """
_CLOSING = frozenset(_CLOSING_WORDS.split())


def cells_at_work(setting: Setting) -> list[Record]:
    """One to many, watched: one photograph's caption by each cell over the epochs.

    A small Show and Tell (256 units, word vectors that begin with an rms of 1, one caption of each
    photograph and epoch, Adam at 0.002, one seed), so that four cells are trained in minutes.
    After each epoch it captions two free photographs (beam 3). `val loss` is the cross-entropy of
    a word under teacher forcing, of the first caption of each validation image. From the networks
    before and after training come the gates and the units of the lesson: there the gates are those
    of a given sentence about the photograph, and the probes read the captions of validation
    without their photographs (all have the mean of the features), so that what is in the state
    comes from the words.
    """
    records: list[Record] = []
    for cell in setting.pick(CELLS, ("lstm", "gru")):
        log_line(f"cells_at_work: {cell}")
        records += _train(setting, cell)
    return records


def draw_cells_at_work(records: Sequence[Record]) -> Any:
    """Draw the loss over the epochs, what probes find, and the LSTM's gates over a sentence."""
    figure = new_figure(2, 2, 6.4, 3.2)
    _draw_losses(figure.add_subplot(2, 2, 1), records)
    _draw_probes(figure.add_subplot(2, 2, 2), records)
    seen = [r for r in records if "gates" in r and r["cell"] == records[0]["cell"]]
    for place, record in enumerate(seen[:2], 3):
        axes = figure.add_subplot(2, 2, place)
        gates = {name: g["mean"] for name, g in record["gates"].items() if name != "candidate"}
        image = axes.imshow(list(gates.values()), cmap="cividis", aspect="auto", vmin=0.3, vmax=0.9)
        axes.set_yticks(range(len(gates)), gates)
        axes.set_xticks(range(2 + len(SENTENCE.split())), ["image", "start", *SENTENCE.split()])
        axes.tick_params(axis="x", rotation=60)
        when = f"after {record['epoch']} epochs" if record["epoch"] else "before training"
        axes.set_title(f"{record['cell']}, {when}: gates, mean of the units")
        figure.colorbar(image, ax=axes)
    return figure


def _draw_losses(axes: Any, records: Sequence[Record]) -> None:
    lines = {}
    for (cell,), of_cell in groups(records, ("cell",)).items():
        trained = [record for record in of_cell if record["epoch"]]
        epochs, losses = zip(*((r["epoch"], r["val_loss"]) for r in trained), strict=True)
        (lines[cell],) = axes.plot(epochs, losses, color=COLOURS[cell], marker=".")
    axes.set(xlabel="epoch (one caption of each photograph)", ylabel="validation loss of a word")
    axes.set_xlim(0.5, max(record["epoch"] for record in records) * 1.2)
    label_lines(axes, lines)


def _draw_probes(axes: Any, records: Sequence[Record]) -> None:
    """Draw R² of each target for each cell: a ring before training, a dot after it."""
    probed = [record for record in records if "probes" in record]
    cells = [cell for (cell,) in groups(probed, ("cell",))]
    for record in probed:
        height = 0.16 * cells.index(record["cell"]) - 0.24
        values = [found["all_units"] for found in record["probes"]]
        places = [place + height for place in range(len(values))]
        colour = COLOURS[record["cell"]]
        face = colour if record["epoch"] else "none"
        axes.plot(values, places, "o", color=colour, markerfacecolor=face, markersize=5)
    found = probed[0]["probes"]
    for place, target in enumerate(found):
        axes.plot([target["last_word"]] * 2, [place - 0.35, place + 0.35], color="0.4")
        axes.plot([target["shuffled"]] * 2, [place - 0.35, place + 0.35], ":", color="0.4")
    axes.set_yticks(range(len(found)), [target["target"] for target in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel(
        "R² of a linear probe of the state (ring: before training;\n"
        "line: from the last word alone; dotted: a shuffled target)"
    )


# --- training -----------------------------------------------------------------------------------


def _train(setting: Setting, cell: str) -> list[Record]:
    """Train one cell, and return a record for each epoch, the untrained network first."""
    train, val, vocabulary = load_captions(setting)
    features, val_features = (pooled_features(setting, split.dataset) for split in (train, val))
    photographs = [HERE / "lesson" / f"{name}.jpg" for name in PHOTOGRAPHS]
    shown = pooled_features_of(setting, photographs)
    width = setting.pick(256, 16)
    overrides = [f"decoder.cell={cell}", f"decoder.embedding_size={width}"]
    overrides += [f"decoder.hidden_size={width}", "decoder.embedding_scale=1.732"]
    config = experiment(setting, *overrides)
    torch.manual_seed(0)
    model = make_decoder(config.decoder, len(vocabulary), features.shape[1])
    assert isinstance(model, ShowAndTell)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = TrainingBatches(train.token_ids, 64, 1, 0, 30)
    epochs = setting.pick(8, 1)
    records: list[Record] = []
    for epoch in range(epochs + 1):
        if epoch:
            of_epoch = batches.epoch(epoch)
            loss_of = partial(_batch_loss, model, features, of_epoch)
            fit(model, loss_of, len(of_epoch), optimizer)
        model.eval()
        first = [caption[:1] for caption in val.token_ids]
        hypotheses = generate(
            [InferenceDecoder(model, torch.float32)],
            [shown.unsqueeze(1)],
            config.search,
            vocabulary,
        )
        record: Record = {
            "cell": cell,
            "epoch": epoch,
            "seed": 0,
            "val_loss": _loss(model, val_features, first),
            "captions": [vocabulary.decode(best[0].token_ids) for best in hypotheses],
        }
        if epoch in (0, epochs):
            record |= _look_inside(model, shown[:1], features.mean(0), val, vocabulary)
        records.append(record)
    return records


def _batch_loss(model: Decoder, features: Tensor, batches: Sequence[Any], step: int) -> Tensor:
    batch = batches[step]
    output = model.teacher_forcing(features[batch.images].unsqueeze(1), batch.token_ids)
    return cross_entropy(output.logits, output.targets)


@torch.no_grad()
def _loss(model: Decoder, features: Tensor, captions: list[list[list[int]]]) -> float:
    output = model.teacher_forcing(features.unsqueeze(1), pad(captions))
    return float(cross_entropy(output.logits, output.targets))


# --- what is inside -----------------------------------------------------------------------------


@torch.no_grad()
def _look_inside(
    model: ShowAndTell, image: Tensor, mean_image: Tensor, val: Captions, vocabulary: Vocabulary
) -> Record:
    """Return the gates over the sentence, and what probes find in the state."""
    token_ids = [vocabulary.encode(SENTENCE)]
    seen = model.recurrence.unroll(_inputs(model, image, token_ids))
    gates = {
        name: {
            "mean": seen_gate[0].mean(1).tolist(),
            "units": _varying(seen_gate[0]),
        }
        for name, seen_gate in seen.gates[0].items()
    }
    states, captions = [], []
    for caption in val.flat:
        captions.append([vocabulary.words[token] for token in caption])
    order = sorted(range(len(captions)), key=lambda row: len(captions[row]))
    for start in range(0, len(order), 250):  # of about equal length
        rows = order[start : start + 250]
        states += _states(model, mean_image, [val.flat[row] for row in rows])
    by_row = {row: place for place, row in enumerate(order)}
    states = [states[by_row[row]] for row in range(len(captions))]
    coloured = [text.split() for text in COLOURED]
    coloured_states = _states(model, mean_image, [vocabulary.encode(text) for text in COLOURED])
    return {"gates": gates, "probes": probe(states, captions, coloured_states, coloured)}


def _inputs(model: ShowAndTell, image: Tensor, token_ids: list[list[int]]) -> Tensor:
    """Return what the recurrence reads: the image, BOS and the words, (rows, T + 2, E)."""
    rows = len(token_ids)
    most = max(map(len, token_ids))
    padded = torch.tensor([[BOS, *row, *[0] * (most - len(row))] for row in token_ids])
    first = model.image(model.feature_norm(image)).expand(rows, 1, -1)
    return torch.cat([first, model.embedding(padded)], 1)


def _states(model: ShowAndTell, image: Tensor, token_ids: list[list[int]]) -> list[np.ndarray]:
    """Return the state after each word of each caption, (words, H): c of an LSTM, else h."""
    seen = model.recurrence.unroll(_inputs(model, image.view(1, 1, -1), token_ids))
    states = torch.stack([step[-1] for step in seen.states[0]], 1)  # h, or (h, c): the last
    return [
        row[2 : 2 + len(caption)].numpy() for row, caption in zip(states, token_ids, strict=True)
    ]


def _varying(gate: Tensor, units: int = 32) -> list[list[float]]:
    """Return the units of a gate, (T, H), that change most over the words, by their mean."""
    chosen = gate.var(0).topk(min(units, gate.shape[1])).indices
    chosen = chosen[gate[:, chosen].mean(0).argsort(descending=True)]
    return [[round(value, 3) for value in unit] for unit in gate[:, chosen].T.tolist()]


# --- probes -------------------------------------------------------------------------------------


def open_noun_phrase(words: Sequence[str]) -> list[float]:
    """Say after each word whether a noun phrase is open, by a rule of thumb.

    It opens with an article, a possessive or a number, and ends with a preposition, a conjunction,
    a form of "to be" or a word in -ing.
    """
    states, is_open = [], False
    for word in words:
        if word in _OPENING:
            is_open = True
        elif word in _CLOSING or word.endswith("ing"):
            is_open = False
        states.append(float(is_open))
    return states


def _began_with_number(words: Sequence[str]) -> list[float]:
    return [float(words[0] in NUMBERS)] * len(words)


TARGETS: dict[str, Callable[[Sequence[str]], list[float]]] = {
    "words read": lambda words: [float(place + 1) for place in range(len(words))],
    "words left": lambda words: [float(len(words) - 1 - place) for place in range(len(words))],
    "a noun phrase is open": open_noun_phrase,
    "the caption began with a number": _began_with_number,
}


def probe(
    states: Sequence[np.ndarray],
    captions: Sequence[Sequence[str]],
    shown_states: Sequence[np.ndarray],
    shown: Sequence[Sequence[str]],
) -> list[Record]:
    """Look for a meaning in the state by linear probes: least squares from the state.

    Scores are shares of the target's variance that are explained (R²) in the second half of the
    captions, by what was fitted to the first: from all units; from the one unit that did best in
    the first half; and two controls, from all units to targets that were shuffled over the words,
    and from the last word alone (the target's mean after that word).

    Args:
        states: After each word of each caption, (words, H).
        captions: Their words.
        shown_states: The same of sentences to show.
        shown: Their words.

    Returns:
        For each of ``TARGETS`` the scores, the unit, and its values over the sentences to show.
    """
    half = sum(map(len, captions[: len(captions) // 2]))
    x = np.concatenate(states).astype(np.float64)
    x = (x - x[:half].mean(0)) / (x[:half].std(0) + 1e-9)
    last_words = [word for words in captions for word in words]
    random = np.random.default_rng(0)
    found = []
    for name, target in TARGETS.items():
        y = np.array([value for words in captions for value in target(words)])
        shuffled = random.permutation(y)
        correlations = x[:half].T @ (y[:half] - y[:half].mean())
        unit = int(np.abs(correlations).argmax())
        values = [state[:, unit] * np.sign(correlations[unit]) for state in shown_states]
        scores = {
            "all_units": _score(x, y, half),
            "one_unit": _score(x[:, [unit]], y, half),
            "shuffled": _score(x, shuffled, half),
            "last_word": _word_score(last_words, y, half),
        }
        sentences = [
            [[word, round(float(value), 3)] for word, value in zip(*pair, strict=True)]
            for pair in zip(shown, values, strict=True)
        ]
        found.append({"target": name, **scores, "unit": unit, "sentences": sentences})
    return found


def _score(x: np.ndarray, y: np.ndarray, half: int) -> float:
    """Return R² in the second half of least squares (with a little ridge) on the first."""
    ones = np.concatenate([x, np.ones((len(x), 1))], 1)
    fitted = ones[:half]
    gram = fitted.T @ fitted + 1e-3 * half * np.eye(fitted.shape[1])
    return _explained(ones[half:] @ np.linalg.solve(gram, fitted.T @ y[:half]), y[half:])


def _word_score(words: Sequence[str], y: np.ndarray, half: int) -> float:
    values: dict[str, list[float]] = {}
    for word, value in zip(words[:half], y[:half], strict=True):
        values.setdefault(word, []).append(value)
    means = {word: float(np.mean(of_word)) for word, of_word in values.items()}
    guess = np.array([means.get(word, float(y[:half].mean())) for word in words[half:]])
    return _explained(guess, y[half:])


def _explained(guess: np.ndarray, y: np.ndarray) -> float:
    return float(1 - np.square(guess - y).sum() / max(1e-9, np.square(y - y.mean()).sum()))
