"""The search in NumPy finds what the search in torch finds, with the same rules."""

import numpy as np
import pytest
import torch
from search.step_models import NOTHING, WORDS, HistoryModel, random_constraints, same
from search.step_models import search as torch_search

from captioner.config import SearchConfig
from captioner.errors import ConfigError
from captioner.runtime.beam_search import beam_search, check_settings
from captioner.search.constraints import CompiledConstraints
from captioner.search.rules import Constraints


def numpy_search(model, beam_size, max_length, constraints, **settings):
    """Search by NumPy over the same model, in float64 as it is."""

    def step(tokens, state, memory):
        tensors = [tuple(map(torch.from_numpy, parts)) for parts in (state, memory)]
        logits, new_state = model.step(torch.from_numpy(tokens), *tensors)
        log_probs = logits.float().log_softmax(-1).numpy()
        return log_probs, tuple(part.numpy() for part in new_state)

    state, memory = (tuple(part.numpy() for part in parts) for parts in (model.state, model.memory))
    config = SearchConfig(beam_size, max_length, **settings)
    return beam_search(step, state, memory, config, Constraints(**constraints))


class Single(HistoryModel):
    """Gives its logits in float32, as decoders do."""

    def step(self, token_ids, state, memory):
        logits, state = super().step(token_ids, state, memory)
        return logits.float(), state


@pytest.mark.parametrize("seed", range(60))
def test_it_finds_what_torch_finds(seed):
    """Any beam, penalty, number of captions and constraints; several images of one batch."""
    dice = np.random.default_rng(seed)
    words = int(dice.integers(WORDS, 12))
    model = Single(4 + words, images=4, seed=seed, eos=float(dice.uniform(-2, 1)))
    beam = int(dice.integers(1, 7))
    settings = {"length_penalty": float(dice.choice([0.0, 0.7, 1.0]))}
    settings["n_best"] = int(dice.integers(1, beam + 1))
    constraints = random_constraints(seed, words, forced=False)
    length = int(dice.integers(4, 9))
    expected = torch_search(model, beam, length, constraints, **settings)
    found = numpy_search(model, beam, length, {"max_length": length, **constraints}, **settings)
    assert [len(of_image) for of_image in found] == [len(of_image) for of_image in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.ended == other.ended
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5)


def test_a_beam_wider_than_the_vocabulary():
    model = Single(4 + WORDS, images=2, seed=3)
    expected = torch_search(model, 40, 4, {}, n_best=9)
    found = numpy_search(model, 40, 4, {"max_length": 4}, n_best=9)
    for ours, theirs in zip(found, expected, strict=True):
        assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]
        assert all(map(same, ours, theirs)) or ours[0].log_probability == pytest.approx(
            theirs[0].log_probability, abs=1e-5
        )


def test_no_caption_meets_the_constraints():
    words = tuple((word,) for word in range(4, 4 + WORDS))
    model = Single(4 + WORDS, images=2, seed=0)
    found = numpy_search(model, 3, 4, {"max_length": 4, "min_length": 1, "forbidden": words})
    assert found == [NOTHING, NOTHING]


def test_an_image_with_nan_has_none_and_changes_no_other():
    model = Single(4 + WORDS, images=3, seed=1)
    expected = numpy_search(model, 3, 5, {"max_length": 5})
    model.memory[0][1] = float("nan")
    found = numpy_search(model, 3, 5, {"max_length": 5})
    assert found[1] == []
    assert [found[0], found[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("seed", range(40))
def test_the_rules_exclude_the_same_words_as_their_tensors(seed):
    dice = np.random.default_rng(seed)
    words = 8
    fields = random_constraints(seed, words, forced=False) | {"max_length": 6}
    constraints = Constraints(**fields)
    compiled = CompiledConstraints(constraints, 4 + words, torch.device("cpu"))
    for length in range(6):
        tokens = dice.integers(4, 4 + words, length)
        log_probs = torch.zeros(1, 1, 4 + words)
        token_ids = torch.from_numpy(tokens).view(1, 1, -1)
        compiled.forbid(log_probs, token_ids, compiled.init_state(1))
        expected = set(torch.nonzero(log_probs[0, 0] == -torch.inf).flatten().tolist())
        assert constraints.excluded(tuple(tokens.tolist())) == expected, (fields, tokens)


def test_what_it_does_not_do_is_refused():
    for settings in ({"forced": ("dog",)}, {"samples": 2}, {"beam_size": 4, "groups": 2}):
        with pytest.raises(ConfigError, match=r"needs torch"):
            check_settings(SearchConfig(**settings))
    check_settings(SearchConfig(beam_size=1, forbidden=("dog",), no_dangling_end=True))
