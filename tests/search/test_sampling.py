"""Sampling: drawn as often as the model says, the same by seed and image, within the rules."""

import itertools
import math
from collections import Counter

import pytest
import torch
from test_constraints import NOTHING, assert_scored_by, find, meets, some_rules
from test_decoding import INF, HistoryModel, constant, greedy

from captioner.config import SearchConfig
from captioner.data.vocabulary import BOS, EOS, PAD, UNK
from captioner.errors import SearchError
from captioner.search import decode
from captioner.search.sampling import uniform

LOGITS = [3.0, 4.0, 0.2, 5.0, 1.5, 0.1, -1.0, 1.4, 0.9, -2.5, 0.6, -0.3]
SETTINGS = [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.6}]
SETTINGS += [{"top_p": 0.93}, {"temperature": 1.7, "top_k": 6, "top_p": 0.8}]


def sample(model, samples, max_length, rules=None, keys=None, **settings):
    settings = {"samples": samples, "n_best": samples, **settings}
    return find(model, 5, max_length, rules, keys=keys, **settings)


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
    return sum(
        (found - should) ** 2 / should for found, should in zip(counts, expected, strict=True)
    )


def allowed(freedom: int) -> float:
    """Return five standard deviations above what chance makes of chi-square."""
    return freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("images", "samples"), [(1, 12000), (12000, 1), (300, 40)])
def test_first_words_come_as_often_as_the_model_says(images, samples, settings):
    step, state = constant(LOGITS, images)
    search = SearchConfig(max_length=1, samples=samples, n_best=samples, seed=3, **settings)
    found = [caption for best in decode(step, state, (), search) for caption in best]
    counts = Counter(caption.token_ids[0] if caption.token_ids else EOS for caption in found)
    expected = shares(**settings)
    assert counts.keys() <= expected.keys()

    def misfit(share):
        numbers = [share.get(token, 1e-9) * len(found) for token in expected]
        return chi_square([counts[token] for token in expected], numbers)

    assert misfit(expected) < allowed(len(expected) - 1)
    # Where the settings leave no word out, this sees that they have changed anything.
    assert not settings or len(expected) < len(shares()) or misfit(shares()) > 100


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-9}], ids=str
)
def test_the_likeliest_word_alone_is_greedy_search(settings):
    model = HistoryModel(vocabulary_size=11, images=6, seed=1, eos=-0.5)
    for image, found in enumerate(sample(model, 3, 9, **settings)):
        assert [caption.token_ids for caption in found] == [greedy(model.only(image), 9)] * 3


def test_log_probabilities_are_the_models_own_and_in_order():
    model = HistoryModel(vocabulary_size=9, images=4, seed=0)
    settings = {"temperature": 1.8, "top_k": 4, "top_p": 0.9, "length_penalty": 0.7}
    for image, found in enumerate(sample(model, 8, 7, **settings)):
        assert len({tuple(caption.token_ids) for caption in found}) > 3
        for caption in found:
            assert_scored_by(model.only(image), caption)
        ranks = [c.log_probability / (len(c.token_ids) + 1) ** 0.7 for c in found]
        assert ranks == sorted(ranks, reverse=True)
        few = sample(model.only(image), 8, 7, keys=torch.tensor([image]), **settings, n_best=2)
        assert few == [found[:2]]


def test_the_same_seed_draws_the_same():
    model = HistoryModel(vocabulary_size=12, images=6, seed=0)
    first = sample(model, 4, 8, seed=5)
    assert sample(model, 4, 8, seed=5) == first
    assert all(found != other for found, other in zip(sample(model, 4, 8), first, strict=True))


def test_samples_of_an_image_depend_on_its_key_alone():
    """Not on the images beside it, and not on where it stands among them."""
    model = HistoryModel(vocabulary_size=12, images=12, seed=0)
    keys = torch.randint(0, 2**32, (12,), generator=torch.Generator().manual_seed(0))
    together = sample(model, 4, 10, keys=keys)
    assert len({len(best[0].token_ids) for best in together}) > 3
    for image, found in enumerate(together):
        assert sample(model.only(image), 4, 10, keys=keys[image : image + 1]) == [found]
        assert sample(model.only(image), 4, 10, keys=keys[image : image + 1] + 1) != [found]
    model.memory = (model.memory[0].flip(0),)
    assert sample(model, 4, 10, keys=keys.flip(0)) == together[::-1]
    assert sample(model, 4, 10) == sample(model, 4, 10, keys=torch.arange(12))


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
def test_samples_keep_to_the_rules(seed):
    model, rules = HistoryModel(10, images=8, seed=seed), some_rules(seed + 30, 6, forced=False)
    settings = {"temperature": 1.5, "top_p": 0.95}
    together = sample(model, 4, 8, rules, **settings)
    assert sum(found != NOTHING for found in together) > 5
    for image, found in enumerate(together):
        assert sample(model.only(image), 4, 8, rules, torch.tensor([image]), **settings) == [found]
        for caption in found if found != NOTHING else ():
            assert meets(caption.token_ids, **rules)
            assert_scored_by(model.only(image), caption)


@pytest.mark.parametrize("bad_step", [0, 2])
def test_nan_is_never_drawn(bad_step):
    model = HistoryModel(vocabulary_size=8, images=4, seed=0, eos=-9.0)

    def step(token_ids, state, memory):
        logits, state = model.step(token_ids, state, memory)
        if len(model.sizes) == bad_step + 1:
            logits[memory[0] == model.memory[0][1], :, 4] = math.nan
        return logits, state

    with pytest.raises(SearchError, match=r"NaN .* for 1 of 4 images"):
        find(model, 5, 4, step=step, samples=3)


def test_what_has_no_probability_is_never_drawn():
    step, state = constant([0.0, 0.0, -INF, 0.0, 1.0, -INF, 0.5], images=50)
    search = SearchConfig(max_length=6, samples=4, n_best=4, temperature=3.0)
    for found in decode(step, state, (), search):
        for caption in found:
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
