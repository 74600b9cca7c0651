"""Sampling: drawn as often as the model says, the same by seed and image, within constraints."""

import itertools
import math
from collections import Counter

import pytest
import torch
from step_models import (
    INF,
    NOTHING,
    HistoryModel,
    assert_scored_by,
    constant,
    greedy,
    meets,
    random_constraints,
    score,
    search,
)

from captioner.config import SearchConfig
from captioner.data.vocabulary import BOS, EOS, PAD, UNK
from captioner.search.decoding import decode
from captioner.search.sampling import uniform

LOGITS = [3.0, 4.0, 0.2, 5.0, 1.5, 0.1, -1.0, 1.4, 0.9, -2.5, 0.6, -0.3]
SETTINGS = [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.6}]
SETTINGS += [{"top_p": 0.93}, {"temperature": 1.7, "top_k": 6, "top_p": 0.8}]


def sample(model, samples, max_length, constraints=None, image_keys=None, **settings):
    settings = {"samples": samples, "n_best": samples, **settings}
    return search(model, 5, max_length, constraints, image_keys=image_keys, **settings)


def shares(temperature=1.0, top_k=0, top_p=1.0) -> dict[int, float]:
    """Return how often each first token is to be drawn."""
    weights = {
        token: math.exp(logit / temperature)
        for token, logit in enumerate(LOGITS)
        if token not in (PAD, BOS, UNK)
    }
    likeliest = sorted(weights, key=lambda token: -weights[token])[: top_k or None]
    whole, nucleus = sum(weights[token] for token in likeliest), []
    for token in likeliest:
        if sum(weights[t] for t in nucleus) < top_p * whole:
            nucleus.append(token)
    return {token: weights[token] / sum(weights[t] for t in nucleus) for token in nucleus}


def chi_square(counts, expected) -> float:
    pairs = zip(counts, expected, strict=True)
    return sum((count - share) ** 2 / share for count, share in pairs)


def allowed(freedom: int) -> float:
    """Return five standard deviations above what chance makes of chi-square."""
    return freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("images", "samples"), [(1, 10000), (12000, 1), (300, 40)])
def test_first_words_come_as_often_as_the_model_says(images, samples, settings):
    step, state = constant(LOGITS, images)
    config = SearchConfig(max_length=1, samples=samples, n_best=samples, seed=3, **settings)
    hypotheses = [caption for best in decode(step, state, (), config) for caption in best]
    counts = Counter(caption.token_ids[0] if caption.token_ids else EOS for caption in hypotheses)
    expected = shares(**settings)
    assert counts.keys() <= expected.keys()

    def misfit(share):
        numbers = [share.get(token, 1e-9) * len(hypotheses) for token in expected]
        return chi_square([counts[token] for token in expected], numbers)

    assert misfit(expected) < allowed(len(expected) - 1)
    # Where the settings leave no word out, this sees that they have changed anything.
    assert not settings or len(expected) < len(shares()) or misfit(shares()) > 100


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-9}], ids=str
)
def test_the_likeliest_word_alone_is_greedy_search(settings):
    model = HistoryModel(vocabulary_size=11, images=6, seed=1, eos=-0.5)
    for image, captions in enumerate(sample(model, 3, 9, **settings)):
        assert [caption.token_ids for caption in captions] == [greedy(model.only(image), 9)] * 3


def test_log_probabilities_are_the_models_own_and_in_order():
    model = HistoryModel(vocabulary_size=9, images=4, seed=0)
    settings = {"temperature": 1.8, "top_k": 4, "top_p": 0.9, "length_penalty": 0.7}
    for image, captions in enumerate(sample(model, 8, 7, **settings)):
        assert len({tuple(caption.token_ids) for caption in captions}) > 3
        for caption in captions:
            assert_scored_by(model.only(image), caption)
        scores = [score(caption, 0.7) for caption in captions]
        assert scores == sorted(scores, reverse=True)
        few = sample(
            model.only(image), 8, 7, image_keys=torch.tensor([image]), **settings, n_best=2
        )
        assert few == [captions[:2]]


def test_the_same_seed_draws_the_same():
    model = HistoryModel(vocabulary_size=12, images=6, seed=0)
    first = sample(model, 4, 8, seed=5)
    assert sample(model, 4, 8, seed=5) == first
    other_seed = sample(model, 4, 8)
    assert all(one != other for one, other in zip(first, other_seed, strict=True))


def test_samples_of_an_image_depend_on_its_key_alone():
    """Not on the images beside it, and not on where it stands among them."""
    model = HistoryModel(vocabulary_size=12, images=12, seed=0)
    keys = torch.randint(0, 2**32, (12,), generator=torch.Generator().manual_seed(0))
    together = sample(model, 4, 10, image_keys=keys)
    assert len({len(best[0].token_ids) for best in together}) > 3
    for image, captions in enumerate(together):
        key = keys[image : image + 1]
        assert sample(model.only(image), 4, 10, image_keys=key) == [captions]
        assert sample(model.only(image), 4, 10, image_keys=key + 1) != [captions]
    model.memory = (model.memory[0].flip(0),)
    assert sample(model, 4, 10, image_keys=keys.flip(0)) == together[::-1]
    assert sample(model, 4, 10) == sample(model, 4, 10, image_keys=torch.arange(12))


def test_samples_that_have_ended_stay_as_they_are():
    """With room for more words the same are drawn: what had ended is unchanged, the rest go on."""
    model = HistoryModel(vocabulary_size=9, images=300, seed=4)
    ended = 0
    for short, long in zip(sample(model, 1, 4), sample(model, 1, 12), strict=True):
        assert long[0].token_ids[:4] == short[0].token_ids
        if len(short[0].token_ids) < 4:
            assert long == short
            ended += 1
    assert 50 < ended < 250


@pytest.mark.parametrize("seed", range(8))
def test_samples_keep_to_the_constraints(seed):
    model = HistoryModel(10, images=8, seed=seed)
    constraints = random_constraints(seed + 30, 6, forced=False)
    settings = {"temperature": 1.5, "top_p": 0.95}
    together = sample(model, 4, 8, constraints, **settings)
    assert sum(hypotheses != NOTHING for hypotheses in together) > 5
    for image, captions in enumerate(together):
        key = torch.tensor([image])
        assert sample(model.only(image), 4, 8, constraints, key, **settings) == [captions]
        for caption in captions if captions != NOTHING else ():
            assert meets(caption.token_ids, **constraints)
            assert_scored_by(model.only(image), caption)


@pytest.mark.parametrize("bad_step", [0, 2])
def test_nan_is_never_drawn(bad_step):
    model = HistoryModel(vocabulary_size=8, images=4, seed=0, eos=-9.0)

    def step(token_ids, state, memory):
        logits, state = model.step(token_ids, state, memory)
        if len(model.sizes) == bad_step + 1:
            logits[memory[0] == model.memory[0][1], :, 4] = math.nan
        return logits, state

    whole = search(model, 5, 4, samples=3)
    model.sizes = []
    assert search(model, 5, 4, step=step, samples=3) == [whole[0], [], whole[2], whole[3]]


def test_what_has_no_probability_is_never_drawn():
    step, state = constant([0.0, 0.0, -INF, 0.0, 1.0, -INF, 0.5], images=50)
    config = SearchConfig(max_length=6, samples=4, n_best=4, temperature=3.0)
    for captions in decode(step, state, (), config):
        for caption in captions:
            assert set(caption.token_ids) <= {4, 6}
            assert (len(caption.token_ids), caption.ended) == (6, False)


def test_random_numbers_are_uniform_and_know_nothing_of_each_other():
    """Neighbours by seed, step, image or sample, or by any of these at once."""
    keys, numbers = torch.arange(120), torch.arange(30)
    drawn = torch.stack(
        [
            torch.stack([uniform(seed, keys, numbers, step) for step in range(10)])
            for seed in range(6)
        ]
    ).double()  # (seeds, steps, keys, numbers)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * drawn.numel()))
    counts = torch.histc(drawn, 256, 0, 1).tolist()
    assert chi_square(counts, [drawn.numel() / 256] * 256) < allowed(255)
    for moves in itertools.product((-1, 0, 1), repeat=4):
        if moves <= (0, 0, 0, 0):  # the same pairs the other way round
            continue
        one = other = drawn
        for axis, move in enumerate(moves):
            size = drawn.shape[axis] - abs(move)
            one, other = (
                one.narrow(axis, int(move > 0), size),
                other.narrow(axis, int(move < 0), size),
            )
        cells = (one * 16).long() * 16 + (other * 16).long()
        counts = torch.bincount(cells.flatten(), minlength=256).tolist()
        assert chi_square(counts, [cells.numel() / 256] * 256) < allowed(255), moves
