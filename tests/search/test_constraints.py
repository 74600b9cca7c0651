"""Constraints: exact against all captions there are; made from settings."""

import math

import pytest
from step_models import (
    INF,
    NOTHING,
    NUM_CAPTIONS,
    WORDS,
    HistoryModel,
    assert_scored_by,
    every_caption,
    meets,
    random_constraints,
    same,
    score,
    search,
    small_model,
)

from captioner.config import SearchConfig
from captioner.data.vocabulary import FUNCTION_WORDS, Vocabulary
from captioner.errors import ConfigError
from captioner.search.rules import Constraints

CONSTRAINTS = [
    *({"min_length": length} for length in (1, 3, 5)),
    *({"no_repeat_ngram": order} for order in (1, 2, 3)),
    {"no_repeat_word": True},
    *({"forbidden_endings": words} for words in [(4,), (5, 6), (4, 5, 6)]),
    *({"forbidden": phrases} for phrases in [((4,),), ((4, 5),), ((4, 4), (5, 6, 5), (6,))]),
    *({"forced": phrases} for phrases in [((4,),), ((4, 5),), ((4, 4, 5),), ((4, 5, 4, 5),)]),
    # One in another, one twice, overlapping, and with the same start.
    *({"forced": phrases} for phrases in [((4, 5, 6), (5,)), ((4, 5), (4, 5))]),
    *({"forced": phrases} for phrases in [((4, 5), (5, 6)), ((4, 5), (4, 6)), ((4,), (5,), (6,))]),
    *(random_constraints(seed, WORDS) for seed in range(25)),
]


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=str)
def test_a_wide_beam_finds_all_captions_that_meet_the_constraints_in_order(constraints):
    seed = len(str(constraints)) % 2
    hypotheses = search(small_model(seed), NUM_CAPTIONS, 5, constraints, n_best=NUM_CAPTIONS)
    for image, captions in enumerate(hypotheses):
        every = every_caption(seed, image)
        expected = [caption for caption in every if meets(caption.token_ids, **constraints)]
        expected.sort(key=lambda h: -score(h, 0.7))
        assert len(expected) < len(every) or not constraints
        assert len(captions) == max(len(expected), 1)
        assert all(map(same, captions, expected or NOTHING))


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_what_a_narrow_beam_finds_meets_the_constraints(beam_size):
    """And its log-probability is the model's own, whatever was forbidden on the way."""
    num_captions = 0
    for seed in range(12):
        model, constraints = HistoryModel(9, images=5, seed=seed), random_constraints(seed, 5)
        for image, captions in enumerate(
            search(model, beam_size, 8, constraints, n_best=beam_size)
        ):
            if captions == NOTHING:
                continue
            num_captions += 1
            assert len({tuple(caption.token_ids) for caption in captions}) == len(captions)
            for caption in captions:
                assert meets(caption.token_ids, **constraints)
                assert_scored_by(model.only(image), caption)
    assert num_captions > 40


@pytest.mark.parametrize(
    ("constraints", "settings"),
    [
        (
            random_constraints(6, 8, forced=False)
            | {"no_repeat_ngram": 2, "forbidden_endings": (4, 5)},
            {},
        ),
        ({"min_length": 3, "no_repeat_word": True, "forbidden": ((4, 5), (6,))}, {"groups": 2}),
        ({"no_repeat_ngram": 1, "forbidden_endings": (4, 7)}, {"groups": 4, "diversity": 3.0}),
        ({"forced": ((4, 5), (6,)), "no_repeat_ngram": 2, "forbidden_endings": (6,)}, {}),
    ],
)
def test_batched_equals_one_by_one(constraints, settings):
    model = HistoryModel(vocabulary_size=12, images=16, seed=0)
    together = search(model, 4, 10, constraints, n_best=3, **settings)
    assert len({len(best[0].token_ids) for best in together}) > 3
    for image, captions in enumerate(together):
        alone = search(model.only(image), 4, 10, constraints, n_best=3, **settings)
        assert alone == [captions]


@pytest.mark.parametrize("settings", [{}, {"groups": 3, "diversity": 1.0}], ids=str)
def test_stopping_early_loses_nothing(settings):
    """Equal to the search for as many captions as there are places, which goes on to the end."""
    early = full = 0
    for seed in range(8):
        model = HistoryModel(10, images=8, seed=seed)
        constraints = random_constraints(seed + 50, 6, forced=not settings)
        every = search(model, 6, 12, constraints, n_best=6, **settings)
        full += sum(map(math.prod, model.sizes))
        model.sizes.clear()
        first = search(model, 6, 12, constraints, **settings)
        early += sum(map(math.prod, model.sizes))
        assert first == [best[:1] for best in every]
        assert search(model, 6, 12, constraints, n_best=4, **settings) == [
            best[:4] for best in every
        ]
    assert early < full


def test_an_image_without_a_caption_leaves_the_others_alone():
    model = HistoryModel(10, images=4, seed=1)

    def step(token_ids, state, memory):
        logits, state = model.step(token_ids, state, memory)
        logits[memory[0] == model.memory[0][1], :, 5] = -INF  # one image never gets a 5
        return logits, state

    constraints = {"forced": ((4, 5),), "no_repeat_word": True}
    hypotheses = search(model, 3, 6, constraints, step, n_best=3)
    expected = search(model, 3, 6, constraints, n_best=3)
    assert hypotheses == [expected[0], NOTHING, *expected[2:]]
    assert NOTHING not in expected


@pytest.mark.parametrize(
    "constraints",
    [
        {"forced": ((4, 5), (6,), (7, 8))},
        {"forced": ((4, 5), (4, 6)), "no_repeat_ngram": 1},
        {"forced": ((4,),), "forbidden": ((4,),)},
        {"min_length": 4, "forbidden": tuple((word,) for word in range(4, 10))},
        {"min_length": 1, "forbidden_endings": tuple(range(4, 10))},
    ],
    ids=str,
)
@pytest.mark.parametrize("beam_size", [1, 4])
def test_constraints_that_no_caption_meets_give_nothing(constraints, beam_size):
    model = HistoryModel(10, images=3, seed=0)
    hypotheses = search(model, beam_size, 4, constraints, n_best=beam_size)
    assert hypotheses == [NOTHING] * 3


# --- made from settings -----------------------------------------------------------------------

VOCABULARY = Vocabulary.from_captions(["a man on a red horse", "the horse with a man", "dogs run"])


def ids(text: str) -> tuple[int, ...]:
    return tuple(VOCABULARY.words.index(word) for word in text.split())


def test_constraints_of_settings():
    constraints = Constraints.from_config(
        SearchConfig(
            max_length=9,
            min_length=2,
            no_repeat_ngram=3,
            no_repeat_word=True,
            no_dangling_end=True,
            forbidden=("Dogs", "red zebra", "a  RED horse."),
            forced=("man", "on a", "Man"),
        ),
        VOCABULARY,
    )
    endings = {VOCABULARY.words[word] for word in constraints.forbidden_endings}
    assert endings == FUNCTION_WORDS & {*VOCABULARY.words} == {"a", "on", "the", "with"}
    assert len(constraints.forbidden_endings) == 4
    assert (constraints.min_length, constraints.max_length) == (2, 9)
    assert (constraints.no_repeat_ngram, constraints.no_repeat_word) == (3, True)
    # "zebra" is unknown: it is never generated anyway.
    assert constraints.forbidden == (ids("dogs"), ids("a red horse"))
    assert constraints.forced == (ids("man"), ids("on a"))
    assert Constraints.from_config(SearchConfig(), VOCABULARY) == Constraints()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"forced": ("man", "red zebra")}, r"forced: 'red zebra' .* zebra isn't in the vocab"),
        ({"forced": ("red",), "forbidden": ("red",)}, "forced: 'red' is ruled out by .*forbidden"),
        ({"forced": ("a red horse",), "forbidden": ("red horse",)}, "ruled out by .*forbidden"),
        ({"forced": ("run run",), "no_repeat_word": True}, "'run run' .*search.no_repeat_word"),
        ({"forced": ("a man a man",), "no_repeat_ngram": 2}, "'a man a man' .*no_repeat_ngram"),
        ({"forced": ("a man",), "max_length": 1}, "2 words, more than .*max_length = 1"),
        ({"forced": ("",)}, "search.forced: a word or phrase was expected, found ''"),
        ({"forbidden": ("man", " . ")}, "search.forbidden: a word or phrase was expected, found"),
    ],
)
def test_words_that_cannot_be_are_refused(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        Constraints.from_config(SearchConfig(**settings), VOCABULARY)
