"""Many to many, in step, where what follows matters too: tags for the words of captions."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from captioner.data.vocabulary import PAD, Vocabulary
from captioner.models.recurrent import RecurrentStack, reverse_rows
from captioner.models.recurrent_cells import CELLS
from experiments.recurrence.captions import load_captions, pad_rows
from experiments.recurrence.study import Record, Setting, batch_of, groups, train_models

# What nouns stand for, 1 to 3; 0 is no noun of these. Common nouns of the training captions.
NOUNS = (
    "man woman boy girl child baby kid toddler person player lady guy men women boys girls "
    "children people kids players couple crowd group team biker skier surfer snowboarder rider "
    "climber",
    "dog dogs puppy cat horse horses bird birds animal animals cow sheep",
    "ball stick toy frisbee rope rock tree bench bike bicycle motorcycle skateboard snowboard "
    "surfboard car boat slide swing fence wall shirt jacket hat dress hair pants shorts helmet "
    "coat beach water snow grass field street sand hill mountain ocean lake river pool park",
)
KINDS = len(NOUNS) + 1
IGNORED = -100  # in place of a tag, where a row is padded


def tag_of_words(kinds: Sequence[int]) -> list[int]:
    """Return each word's tag: the kinds of the nearest noun before and the nearest noun after it.

    Args:
        kinds: Of a caption's words: 1 to 3, or 0 where it is no noun.

    Returns:
        4 * before + after, 0 where there is none. A noun is neither before nor after itself.
    """
    before, after = [0], [0]
    for kind in kinds[:-1]:
        before.append(kind or before[-1])
    for kind in reversed(kinds[1:]):
        after.append(kind or after[-1])
    return [KINDS * b + a for b, a in zip(before, reversed(after), strict=True)]


class Tagger(nn.Module):
    """Names a tag for each word, from its vector and what a recurrence has read.

    Args:
        cell: One of ``CELLS``, or "" for the word alone.
        reads: "forward", "backward" or "both".
        vocabulary_size: Of the captions.
        units: H, in each direction.
    """

    def __init__(
        self, cell: str, reads: str, vocabulary_size: int, units: int = 64, width: int = 64
    ) -> None:
        super().__init__()
        self.backward_alone = reads == "backward"
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=PAD)
        self.stack = (
            RecurrentStack(cell, width, units, return_sequences=True, bidirectional=reads == "both")
            if cell
            else None
        )
        self.word = None if cell else nn.Sequential(nn.Linear(width, units), nn.ReLU())
        self.output = nn.Linear(self.stack.output_size if self.stack else units, KINDS**2)

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return a score of each tag for each word, (rows, T, 16)."""
        words = self.embedding(token_ids)
        if self.word is not None:
            return self.output(self.word(words))
        assert self.stack is not None
        if not self.backward_alone:
            return self.output(self.stack(words, None, lengths))
        h = self.stack(reverse_rows(words, lengths), None, lengths)
        return self.output(reverse_rows(h, lengths))


def tagging(setting: Setting) -> list[Record]:
    """Many to many, in step, with what follows: between which nouns does each word stand?

    Each word of a caption is tagged by rule with two kinds: that of the nearest noun before it and
    that of the nearest noun after it (person, animal, thing or none; by lists of common nouns), 16
    tags. `before` and `after` are the shares of words with that half right, `accuracy` with both.
    A forward reader lacks what follows: captions that begin alike go on differently, and it must
    give their common beginning one tag. `any forward reader` is the most that is possible without
    it on these captions, whatever the model: for each beginning that occurs, its commonest tag. It
    is a high bound, since most longer beginnings occur once. A backward reader lacks what came
    before. `same size` has as many weights in its recurrence as the forward LSTM.
    """
    train, val, vocabulary = load_captions(setting)
    kinds = _kinds_by_token(vocabulary)
    captions, held_out = (
        [caption for caption in split.flat if len(caption) > 1] for split in (train, val)
    )
    held_out = held_out[: setting.pick(5000, 40)]
    shown, truth = pad_rows(held_out), _tag_rows(held_out, kinds)
    size = len(vocabulary)
    models: dict[str, Callable[[], nn.Module]] = {
        "the word alone": partial(Tagger, "", "", size),
        "lstm, forward": partial(Tagger, "lstm", "forward", size),
        "lstm, backward": partial(Tagger, "lstm", "backward", size),
        "lstm, both, same size": partial(Tagger, "lstm", "both", size, 39),
        **{f"{cell}, both": partial(Tagger, cell, "both", size) for cell in CELLS},
    }

    def loss_of(model: nn.Module, random: np.random.Generator) -> Tensor:
        rows = [captions[i] for i in batch_of(len(captions), random, 64)]
        scores = model(*pad_rows(rows)).flatten(0, 1)
        return cross_entropy(scores, _tag_rows(rows, kinds).flatten(), ignore_index=IGNORED)

    def scores_of(model: nn.Module) -> dict[str, float]:
        return _tag_scores(model(*shown).argmax(2), truth)

    bound = best_of_beginnings(held_out, truth)
    records: list[Record] = [
        {"model": "any forward reader: at most", "seed": 0, "parameters": None, "accuracy": bound}
    ]
    steps = setting.pick(800, 5)
    return records + train_models("tagging", setting, models, loss_of, scores_of, steps)


def best_of_beginnings(captions: Sequence[Sequence[int]], tags: Tensor) -> float:
    """Return the share of words whose tag is the commonest of all with the same beginning.

    A reader that knows what was read up to a word, that word with it, can't be right more often.
    """
    seen = [
        {"beginning": tuple(caption[: place + 1]), "tag": int(tags[row, place])}
        for row, caption in enumerate(captions)
        for place in range(len(caption))
    ]
    right = 0
    for alike in groups(seen, ("beginning",)).values():
        right += max(len(same) for same in groups(alike, ("tag",)).values())
    return right / len(seen)


def _kinds_by_token(vocabulary: Vocabulary) -> list[int]:
    kinds = {noun: kind for kind, nouns in enumerate(NOUNS, 1) for noun in nouns.split()}
    return [kinds.get(word, 0) for word in vocabulary.words]


def _tag_rows(captions: Sequence[Sequence[int]], kinds: Sequence[int]) -> Tensor:
    """Return the tags of captions, (rows, T)."""
    tags = torch.full((len(captions), max(map(len, captions))), IGNORED)
    for row, caption in enumerate(captions):
        tags[row, : len(caption)] = torch.tensor(tag_of_words([kinds[token] for token in caption]))
    return tags


def _tag_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    real = truth != IGNORED
    predicted, truth = predicted[real], truth[real]
    same = {
        "accuracy": predicted == truth,
        "before": predicted // KINDS == truth // KINDS,
        "after": predicted % KINDS == truth % KINDS,
    }
    return {name: float(each.float().mean()) for name, each in same.items()}
