"""Many to many, out of step: an encoder reads words, a decoder names them in another order."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from captioner.data.vocabulary import BOS, PAD
from captioner.models.recurrent import RecurrentStack, reverse_rows
from captioner.models.recurrent_cells import CELLS, states_per_layer
from experiments.recurrence.captions import load_captions, pad_rows
from experiments.recurrence.pictures import Record
from experiments.recurrence.study import Setting, batch_of, train_models


class Unshuffler(nn.Module):
    """Reads words in any order, then names them in the right one (Sutskever et al. 2014).

    At each step it chooses among the words that are left: the score of a word is the product of
    its key with the decoder's h. The encoder is a recurrence, or a bag of words ("bag"); the
    decoder a recurrence, or ("") a feed-forward layer that knows the bag and the position alone.
    """

    def __init__(self, encoder: str, decoder: str, vocabulary_size: int, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=PAD)
        self.key = nn.Linear(width, width)
        stack = partial(
            RecurrentStack,
            input_size=width,
            hidden_size=width,
            return_sequences=True,
            return_state=True,
        )
        self.encoder = None if encoder == "bag" else stack(encoder)
        self.decoder = stack(decoder) if decoder else None
        self.bag = nn.Linear(width, width)
        self.position = nn.Embedding(32, width)
        self.states = states_per_layer(decoder) if decoder else 0

    def init_state(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Read the words, (rows, n, D); return what the decoder begins with, (1, rows, D) each."""
        if self.encoder:
            return self.encoder(words, None, lengths)[1]
        h = torch.tanh(self.bag(words.sum(1) / lengths.sqrt().unsqueeze(1))).unsqueeze(0)
        return (h, torch.zeros_like(h))[: max(1, self.states)]

    def scores(
        self, previous: Tensor, begin: int, state: tuple[Tensor, ...], keys: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return a score of each word for each step after ``previous`` (rows, T): (rows, T, n)."""
        if self.decoder:
            h, state = self.decoder(self.embedding(previous), state)
        else:
            places = torch.arange(begin, begin + previous.shape[1])
            h = torch.tanh(state[0].transpose(0, 1) + self.position(places))
        return h @ keys.transpose(1, 2), state

    def loss(self, token_ids: Tensor, lengths: Tensor, order: Tensor) -> Tensor:
        """Return the mean cross-entropy of the true next words among those that are left.

        Args:
            token_ids: The shuffled captions, (rows, n).
            lengths: (rows,).
            order: Where the words stand in true order, (rows, n).
        """
        words = self.embedding(token_ids)
        true = token_ids.gather(1, order)
        previous = torch.cat([torch.full_like(true[:, :1], BOS), true[:, :-1]], 1)
        scores, _ = self.scores(previous, 0, self.init_state(words, lengths), self.key(words))
        taken = nn.functional.one_hot(order, order.shape[1]).cumsum(1)
        gone = torch.cat([torch.zeros_like(taken[:, :1]), taken[:, :-1]], 1).bool()
        gone |= (token_ids == PAD).unsqueeze(1)
        scores = scores.masked_fill(gone, -1e9)
        # The same word may be there twice: either will do.
        right = token_ids.unsqueeze(1) == true.unsqueeze(2)
        log_probability = scores.masked_fill(~right, -1e9).logsumexp(2) - scores.logsumexp(2)
        real = true != PAD
        return -log_probability[real].mean()

    def order(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the words in the order in which it names them, greedily: (rows, n), then PAD."""
        words = self.embedding(token_ids)
        state, keys = self.init_state(words, lengths), self.key(words)
        gone = token_ids == PAD
        last = torch.full_like(token_ids[:, :1], BOS)
        named = []
        for step in range(token_ids.shape[1]):
            scores, state = self.scores(last, step, state, keys)
            best = scores[:, 0].masked_fill(gone, -torch.inf).argmax(1, keepdim=True)
            last = token_ids.gather(1, best)
            gone = gone.scatter(1, best, True)
            named.append(last)
        beyond = torch.arange(len(named)) >= lengths.unsqueeze(1)
        return torch.cat(named, 1).masked_fill(beyond, PAD)


def unshuffle(setting: Setting) -> list[Record]:
    """Many to many: shuffled caption to caption in order.

    Captions of 5 to 9 words; an encoder reads them shuffled, a decoder names one word after the
    other, out of those that are left. `right place` is the share of words at their true place,
    `whole captions` that of captions wholly in order, both of freely decoded ones. The last words
    are easier: fewer are left. The feed-forward model knows which words there are and which place
    is to be filled, but not what it named before.
    """
    return _train_to_order("unshuffle", setting, shuffled_rows, "as shuffled")


def reversal(setting: Setting) -> list[Record]:
    """Many to many, where the input's order is all: words in any order, named in reverse.

    The words of captions of 5 to 9 words are read in an order drawn anew each time, and must be
    named from the last to the first: the encoder and decoder of the study above, the same words,
    the same budget. No habit of language helps here, only what the encoder keeps of the order. A
    bag of words is the same whichever order was read, so that whatever it learns to say is right as
    often as a random order of the words: `a random order` is that chance, from how often each word
    stands in each caption.
    """
    return _train_to_order("reversal", setting, reversed_rows, "as read")


def chance_of_order(captions: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return how often a random order of each caption's words is right, as an expectation.

    A word that stands n(w) times among n is expected n(w) * n(w) / n times at a right place, and
    the product of n(w)! of the n! orders read the same.
    """
    places, whole = 0.0, 0.0
    for caption in captions:
        counts = Counter(caption).values()
        places += sum(count**2 for count in counts) / len(caption)
        whole += math.prod(map(math.factorial, counts)) / math.factorial(len(caption))
    return {
        "right_place": places / sum(map(len, captions)),
        "whole_captions": whole / len(captions),
    }


# Captions; shuffled, their lengths, and where the words of the answer stand in them.
Rows = Callable[
    [Sequence[Sequence[int]], np.random.Generator],
    tuple[Tensor, Tensor, Tensor],
]


def _train_to_order(name: str, setting: Setting, rows_of: Rows, as_shown: str) -> list[Record]:
    """Train encoders and decoders to name words in the order that ``rows_of`` asks for."""
    train, val, vocabulary = load_captions(setting)
    captions, held_out = (
        [caption for caption in split.flat if 5 <= len(caption) <= 9] for split in (train, val)
    )
    held_out = held_out[: setting.pick(1500, 40)]
    shown, lengths, order = rows_of(held_out, np.random.default_rng(0))
    truth = shown.gather(1, order)
    size = len(vocabulary)
    models: dict[str, Callable[[], nn.Module]] = {
        "feed-forward": partial(Unshuffler, "bag", "", size),
        "bag, then lstm": partial(Unshuffler, "bag", "lstm", size),
        **{f"{cell}, then {cell}": partial(Unshuffler, cell, cell, size) for cell in CELLS},
    }

    def loss_of(model: nn.Module, random: np.random.Generator) -> Tensor:
        assert isinstance(model, Unshuffler)
        return model.loss(
            *rows_of([captions[i] for i in batch_of(len(captions), random, 128)], random)
        )

    def scores_of(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Unshuffler)
        return _order_scores(model.order(shown, lengths), truth)

    records: list[Record] = [
        {"model": as_shown, "seed": 0, "parameters": 0, **_order_scores(shown, truth)}
    ]
    if rows_of is reversed_rows:
        chance = chance_of_order(held_out)
        records.append({"model": "a random order", "seed": 0, "parameters": 0, **chance})
    return records + train_models(name, setting, models, loss_of, scores_of, setting.pick(800, 5))


def shuffled_rows(
    captions: Sequence[Sequence[int]], random: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return shuffled captions (rows, n), lengths (rows,) and where the words are (rows, n)."""
    orders = [random.permutation(len(caption)) for caption in captions]
    shuffled = [
        [caption[i] for i in order] for caption, order in zip(captions, orders, strict=True)
    ]
    token_ids, lengths = pad_rows(shuffled)
    # Behind the end each place stands for itself, so that every place is named once.
    places = torch.arange(token_ids.shape[1]).repeat(len(captions), 1)
    for row, order in enumerate(orders):
        places[row, : len(order)] = torch.from_numpy(np.argsort(order))
    return token_ids, lengths, places


def reversed_rows(
    captions: Sequence[Sequence[int]], random: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return shuffled captions (rows, n), lengths (rows,) and their places in reverse (rows, n)."""
    token_ids, lengths, order = shuffled_rows(captions, random)
    return token_ids, lengths, reverse_rows(order.sort(1).values, lengths)


def _order_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    real = truth != PAD
    right = (predicted == truth) & real
    return {
        "right_place": float(right.sum() / real.sum()),
        "whole_captions": float((right == real).all(1).float().mean()),
    }
