"""Step functions that are small enough to search exhaustively, and what to expect of them."""

import itertools
import math
import random
from functools import cache

import pytest
import torch
from torch import Tensor

from captioner.config import SearchConfig
from captioner.data.vocabulary import BOS, EOS, PAD, UNK
from captioner.search.decoding import decode
from captioner.search.hypothesis import Hypothesis
from captioner.search.rules import Constraints

INF = math.inf
NOTHING = [Hypothesis([], -INF, False)]
WORDS = 3  # of the models that are small enough for all their captions
NUM_CAPTIONS = sum(WORDS**length for length in range(6))  # of at most 5 words


# --- models -----------------------------------------------------------------------------------


class HistoryModel:
    """A random model whose probabilities depend on every token so far, and on the image.

    The state is a number that all tokens so far have been folded into; the logits come out of it
    by sines, so that no two histories are alike.

    Args:
        vocabulary_size: V.
        images: B.
        seed: Another seed, another model.
        eos: Added to EOS's logit.
    """

    def __init__(self, vocabulary_size: int, images: int, seed: int, eos: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.phases = 6 * torch.rand(vocabulary_size, generator=generator, dtype=torch.float64)
        self.memory = (6 * torch.rand(images, generator=generator, dtype=torch.float64),)
        self.state = (torch.full((images, 1), 0.5, dtype=torch.float64),)
        self.eos, self.sizes = eos, []

    def step(self, token_ids: Tensor, state: tuple, memory: tuple) -> tuple[Tensor, tuple]:
        assert token_ids.shape == state[0].shape
        assert len(memory[0]) == len(token_ids)
        self.sizes.append(tuple(token_ids.shape))
        folded = torch.sin(9.7 * state[0] + 1.3 * token_ids + memory[0].unsqueeze(1)) + 1.1
        logits = 2 * torch.sin(5 * folded.unsqueeze(2) + self.phases)
        logits[..., EOS] += self.eos
        return logits, (folded,)

    def search(self, beam_size: int, max_length: int, length_penalty: float = 0.0, n_best: int = 1):
        self.sizes = []
        arguments = (beam_size, max_length, length_penalty, n_best)
        return beam_search(self.step, self.state, self.memory, *arguments)

    def only(self, image: int) -> "HistoryModel":
        """Return the same model with one image alone."""
        other = HistoryModel(len(self.phases), 1, 0, self.eos)
        other.phases = self.phases
        other.memory = (self.memory[0][image : image + 1],)
        return other

    def log_probability(self, token_ids: list[int]) -> float:
        """Return that of a sequence, for the first image; BOS comes before it."""
        state, total = tuple(part[:1] for part in self.state), 0.0
        for last, token in itertools.pairwise([BOS, *token_ids]):
            logits, state = self.step(torch.tensor([[last]]), state, (self.memory[0][:1],))
            total += logits[0, 0].log_softmax(-1)[token].item()
        return total


def constant(logits: list[float], images: int = 2):
    """Return a step function that always gives the same logits, and a state for it."""

    def step(token_ids, state, memory):
        return torch.tensor(logits).expand(*token_ids.shape, len(logits)), state

    return step, (torch.zeros(images, 1),)


def small_model(seed: int) -> HistoryModel:
    return HistoryModel(vocabulary_size=4 + WORDS, images=2, seed=seed, eos=-0.5)


# --- searches ---------------------------------------------------------------------------------


def beam_search(step, state, memory, beam_size, max_length, length_penalty=0.0, n_best=1):
    """Search by beam, without constraints."""
    settings = SearchConfig(beam_size, max_length, length_penalty, min(n_best, beam_size))
    return decode(step, state, memory, settings)


def search(model, beam_size, max_length, constraints=None, step=None, image_keys=None, **settings):
    """Search with the fields of ``Constraints`` in a dict, and any other settings by name."""
    config = SearchConfig(beam_size, max_length, **settings)
    limits = Constraints(max_length=max_length, **(constraints or {}))
    return decode(step or model.step, model.state, model.memory, config, limits, image_keys)


def brute_force(model: HistoryModel, max_length: int, length_penalty: float) -> list[Hypothesis]:
    """Score every caption there is: best first."""
    words = [t for t in range(len(model.phases)) if t not in (PAD, BOS, EOS, UNK)]
    hypotheses = [
        Hypothesis(list(caption), model.log_probability([*caption, EOS]), True)
        for length in range(max_length + 1)
        for caption in itertools.product(words, repeat=length)
    ]
    return sorted(hypotheses, key=lambda h: -score(h, length_penalty))


def greedy(model: HistoryModel, max_length: int) -> list[int]:
    """Take the likeliest token again and again, for one image."""
    token_ids, last, state = [], BOS, model.state
    while len(token_ids) < max_length:
        logits, state = model.step(torch.tensor([[last]]), state, model.memory)
        logits[..., [PAD, BOS, UNK]] = -INF
        last = int(logits.argmax())
        if last == EOS:
            break
        token_ids.append(last)
    return token_ids


@cache
def every_caption(seed: int, image: int) -> list[Hypothesis]:
    return brute_force(small_model(seed).only(image), 5, 0.0)


# --- what captions must be --------------------------------------------------------------------


def same(hypothesis: Hypothesis, expected: Hypothesis) -> bool:
    return (
        hypothesis.token_ids == expected.token_ids
        and hypothesis.ended == expected.ended
        and hypothesis.log_probability == pytest.approx(expected.log_probability, abs=1e-9)
    )


def score(hypothesis: Hypothesis, length_penalty: float) -> float:
    return hypothesis.log_probability / (len(hypothesis.token_ids) + 1) ** length_penalty


def contains(caption, phrase) -> bool:
    size = len(phrase)
    return any(tuple(caption[i : i + size]) == phrase for i in range(len(caption) - size + 1))


def meets(caption, **fields) -> bool:
    """Tell whether a whole caption meets constraints, by a second implementation of them."""
    constraints, order = Constraints(**fields), fields.get("no_repeat_ngram", 0)
    ngrams = [tuple(caption[i : i + order]) for i in range(len(caption) - order + 1) if order]
    return (
        len(caption) >= constraints.min_length
        and len(ngrams) == len(set(ngrams))
        and not (constraints.no_repeat_word and any(a == b for a, b in itertools.pairwise(caption)))
        and not (caption and caption[-1] in constraints.forbidden_endings)
        and not any(contains(caption, phrase) for phrase in constraints.forbidden)
        and all(contains(caption, phrase) for phrase in constraints.forced)
    )


def random_constraints(seed: int, words: int, forced: bool = True) -> dict:
    """Return fields of ``Constraints`` picked at random; each is there in every second case."""
    dice = random.Random(seed)

    def phrases(*sizes):
        return tuple(tuple(dice.choices(range(4, 4 + words), k=size)) for size in sizes)

    constraints = {
        "min_length": dice.randint(1, 4),
        "no_repeat_ngram": dice.randint(2, 3),
        "no_repeat_word": True,
        "forbidden_endings": tuple(dice.sample(range(4, 4 + words), words - 2)),
        "forbidden": phrases(*dice.choices([1, 2, 3], k=2)),
        "forced": phrases(*dice.choices([1, 2], k=dice.randint(1, 2))),
    }
    if not forced:
        del constraints["forced"]
    return {name: constraint for name, constraint in constraints.items() if dice.random() < 0.5}


def assert_scored_by(model: HistoryModel, hypothesis: Hypothesis) -> None:
    """Check that the log-probability is the model's own, of the words and of EOS."""
    assert hypothesis.ended
    expected = model.log_probability([*hypothesis.token_ids, EOS])
    assert hypothesis.log_probability == pytest.approx(expected, abs=1e-9)
