"""Constraints: exact against all captions there are; forced words, groups, settings, command."""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from run_commands import run_caption
from test_decoding import HistoryModel, brute_force, same
from torch.overrides import TorchFunctionMode

from captioner.config import SearchConfig
from captioner.data.predictions import read_results
from captioner.data.vocabulary import BOS, EOS, FUNCTION_WORDS, PAD, UNK, Vocabulary
from captioner.errors import ConfigError
from captioner.experiment_file import attribute_docs
from captioner.search.constraints import Constraints
from captioner.search.decoding import Hypothesis, decode
from captioner.search.forced_phrases import ForcedPhrases

INF = math.inf
NOTHING = [Hypothesis([], -INF, False)]
WORDS = 3  # of the models that are small enough for all their captions
EVERY = sum(WORDS**length for length in range(6))  # captions of at most 5 words


def find(model, beam_size, max_length, rules=None, step=None, keys=None, **settings):
    """Search by rules that are told as ids."""
    search = SearchConfig(beam_size, max_length, **settings)
    told = Constraints(max_length=max_length, **(rules or {}))
    return decode(step or model.step, model.state, model.memory, search, told, keys)


def holds(caption, phrase) -> bool:
    size = len(phrase)
    return any(tuple(caption[i : i + size]) == phrase for i in range(len(caption) - size + 1))


def meets(caption, **told) -> bool:
    """Tell whether a caption keeps to rules: the same rules again, read off the whole caption."""
    rules, order = Constraints(**told), told.get("no_repeat_ngram", 0)
    ngrams = [tuple(caption[i : i + order]) for i in range(len(caption) - order + 1) if order]
    return (
        len(caption) >= rules.min_length
        and len(ngrams) == len(set(ngrams))
        and not (rules.no_repeat_word and any(a == b for a, b in itertools.pairwise(caption)))
        and not (caption and caption[-1] in rules.forbidden_endings)
        and not any(holds(caption, phrase) for phrase in rules.forbidden)
        and all(holds(caption, phrase) for phrase in rules.forced)
    )


@cache
def every_caption(seed: int, image: int) -> list[Hypothesis]:
    return brute_force(small_model(seed).only(image), 5, 0.0)


def small_model(seed: int) -> HistoryModel:
    return HistoryModel(vocabulary_size=4 + WORDS, images=2, seed=seed, eos=-0.5)


def rank(found: Hypothesis, length_penalty: float) -> float:
    return found.log_probability / (len(found.token_ids) + 1) ** length_penalty


def some_rules(seed: int, words: int, forced: bool = True) -> dict:
    """Return rules picked at random; each is there in every second case."""
    dice = random.Random(seed)

    def phrases(*sizes):
        return tuple(tuple(dice.choices(range(4, 4 + words), k=size)) for size in sizes)

    rules = {
        "min_length": dice.randint(1, 4),
        "no_repeat_ngram": dice.randint(2, 3),
        "no_repeat_word": True,
        "forbidden_endings": tuple(dice.sample(range(4, 4 + words), words - 2)),
        "forbidden": phrases(*dice.choices([1, 2, 3], k=2)),
        "forced": phrases(*dice.choices([1, 2], k=dice.randint(1, 2))),
    }
    if not forced:
        del rules["forced"]
    return {name: rule for name, rule in rules.items() if dice.random() < 0.5}


def assert_scored_by(model: HistoryModel, found: Hypothesis) -> None:
    assert found.ended
    own = model.log_probability([*found.token_ids, EOS])
    assert found.log_probability == pytest.approx(own, abs=1e-9)


# --- each rule --------------------------------------------------------------------------------

RULES = [
    *({"min_length": length} for length in (1, 3, 5)),
    *({"no_repeat_ngram": order} for order in (1, 2, 3)),
    {"no_repeat_word": True},
    *({"forbidden_endings": words} for words in [(4,), (5, 6), (4, 5, 6)]),
    *({"forbidden": phrases} for phrases in [((4,),), ((4, 5),), ((4, 4), (5, 6, 5), (6,))]),
    *({"forced": phrases} for phrases in [((4,),), ((4, 5),), ((4, 4, 5),), ((4, 5, 4, 5),)]),
    # One in another, one twice, overlapping, and with the same start.
    *({"forced": phrases} for phrases in [((4, 5, 6), (5,)), ((4, 5), (4, 5))]),
    *({"forced": phrases} for phrases in [((4, 5), (5, 6)), ((4, 5), (4, 6)), ((4,), (5,), (6,))]),
    *(some_rules(seed, WORDS) for seed in range(25)),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_wide_beam_finds_all_captions_that_meet_the_rules_in_order(rules):
    seed = len(str(rules)) % 2
    for image, found in enumerate(find(small_model(seed), EVERY, 5, rules, n_best=EVERY)):
        every = every_caption(seed, image)
        expected = [caption for caption in every if meets(caption.token_ids, **rules)]
        expected.sort(key=lambda h: -rank(h, 0.7))
        assert len(expected) < len(every) or not rules
        assert len(found) == max(len(expected), 1)
        assert all(map(same, found, expected or NOTHING))


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_what_a_narrow_beam_finds_meets_the_rules(beam_size):
    """And its log-probability is the model's own, whatever was forbidden on the way."""
    found_any = 0
    for seed in range(12):
        model, rules = HistoryModel(9, images=5, seed=seed), some_rules(seed, 5)
        for image, found in enumerate(find(model, beam_size, 8, rules, n_best=beam_size)):
            if found == NOTHING:
                continue
            found_any += 1
            assert len({tuple(caption.token_ids) for caption in found}) == len(found)
            for caption in found:
                assert meets(caption.token_ids, **rules)
                assert_scored_by(model.only(image), caption)
    assert found_any > 40


@pytest.mark.parametrize(
    ("rules", "settings"),
    [
        (some_rules(6, 8, forced=False) | {"no_repeat_ngram": 2, "forbidden_endings": (4, 5)}, {}),
        ({"min_length": 3, "no_repeat_word": True, "forbidden": ((4, 5), (6,))}, {"groups": 2}),
        ({"no_repeat_ngram": 1, "forbidden_endings": (4, 7)}, {"groups": 4, "diversity": 3.0}),
        ({"forced": ((4, 5), (6,)), "no_repeat_ngram": 2, "forbidden_endings": (6,)}, {}),
    ],
)
def test_batched_equals_one_by_one(rules, settings):
    model = HistoryModel(vocabulary_size=12, images=16, seed=0)
    together = find(model, 4, 10, rules, n_best=3, **settings)
    assert len({len(best[0].token_ids) for best in together}) > 3
    for image, found in enumerate(together):
        assert found == find(model.only(image), 4, 10, rules, n_best=3, **settings)[0]


@pytest.mark.parametrize("settings", [{}, {"groups": 3, "diversity": 1.0}], ids=str)
def test_stopping_early_loses_nothing(settings):
    """Equal to the search for as many captions as there are places, which goes on to the end."""
    early = full = 0
    for seed in range(8):
        model = HistoryModel(10, images=8, seed=seed)
        rules = some_rules(seed + 50, 6, forced=not settings)
        every = find(model, 6, 12, rules, n_best=6, **settings)
        full += sum(map(math.prod, model.sizes))
        model.sizes.clear()
        first = find(model, 6, 12, rules, **settings)
        early += sum(map(math.prod, model.sizes))
        assert first == [best[:1] for best in every]
        assert find(model, 6, 12, rules, n_best=4, **settings) == [best[:4] for best in every]
    assert early < full


# --- forced words -----------------------------------------------------------------------------

FORCED = [((4,), (5,), (6,)), ((4, 4, 5),), ((4, 5, 4, 6),), ((4, 5, 6), (5,)), ((4, 5), (5, 6))]
FORCED += [((4, 5), (4, 6)), ((4, 5, 4, 6), (4, 6, 5))]


@pytest.mark.parametrize("phrases", FORCED, ids=str)
@pytest.mark.parametrize("beam_size", [1, 2])
def test_forced_phrases_are_in_every_caption(phrases, beam_size):
    """However narrow the beam, and where every word that there is room for must be one of them."""
    for room in (0, 1, 6):
        max_length = sum(map(len, phrases)) + room
        model = HistoryModel(10, images=30, seed=room)
        found = find(model, beam_size, max_length, {"forced": phrases}, n_best=beam_size)
        for image, captions in enumerate(found):
            for caption in captions:
                assert meets(caption.token_ids, forced=phrases)
                assert len(caption.token_ids) <= max_length
            assert_scored_by(model.only(image), captions[0])


@pytest.mark.parametrize("phrases", FORCED, ids=str)
def test_progress_is_the_longest_part_that_the_last_words_begin(phrases):
    """After any words: 4 4 4 5 holds 4 4 5, although it breaks off once."""
    automaton = ForcedPhrases(phrases, 8, torch.device("cpu"))
    texts = torch.tensor(list(itertools.product([4, 5, 6, 7], repeat=6))).unsqueeze(0)
    states = automaton.init_state(1).expand(-1, texts.shape[1], -1)
    for position in range(6):
        after_each = automaton.words_met_after(states)
        states = automaton.advance(states, texts[..., position])
        chosen = after_each.gather(2, texts[..., position : position + 1]).squeeze(2)
        assert torch.equal(chosen, automaton.words_met(states))
    for text, state, met in zip(
        texts[0].tolist(), states[0].tolist(), automaton.words_met(states)[0], strict=True
    ):
        for phrase, part in zip(phrases, state, strict=True):
            begun = [n for n in range(len(phrase)) if tuple(text[6 - n :]) == phrase[:n]]
            assert part == (len(phrase) if holds(text, phrase) else max(begun))
        assert (met == automaton.total_words) == all(holds(text, phrase) for phrase in phrases)


def test_an_image_without_a_caption_leaves_the_others_alone():
    model = HistoryModel(10, images=4, seed=1)

    def step(token_ids, state, memory):
        logits, state = model.step(token_ids, state, memory)
        logits[memory[0] == model.memory[0][1], :, 5] = -INF  # one image never gets a 5
        return logits, state

    rules = {"forced": ((4, 5),), "no_repeat_word": True}
    found = find(model, 3, 6, rules, step, n_best=3)
    expected = find(model, 3, 6, rules, n_best=3)
    assert found == [expected[0], NOTHING, *expected[2:]]
    assert NOTHING not in expected


@pytest.mark.parametrize(
    "rules",
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
def test_rules_that_no_caption_meets_give_nothing(rules, beam_size):
    found = find(HistoryModel(10, images=3, seed=0), beam_size, 4, rules, n_best=beam_size)
    assert found == [NOTHING] * 3


# --- diverse groups ---------------------------------------------------------------------------


def diverse(model, width, groups, diversity, max_length, length_penalty) -> list[Hypothesis]:
    """Search one image's groups by lists, to the very end; the best of each group come first."""
    beams = [[([], 0.0, False, model.state)] for _ in range(groups)]
    for _ in range(max_length):
        taken = Counter()
        for number, beam in enumerate(beams):
            kept = [hypothesis for hypothesis in beam if hypothesis[2]]
            further = []
            for words, score, _, state in (h for h in beam if not h[2]):
                last = torch.tensor([[words[-1] if words else BOS]])
                logits, after = model.step(last, state, model.memory)
                for token, gain in enumerate(logits[0, 0].log_softmax(-1).tolist()):
                    if token not in (PAD, BOS, UNK):
                        new = (words, score + gain, True, after)
                        if token != EOS:
                            new = ([*words, token], score + gain, False, after)
                        further.append((score + gain - diversity * taken[token], new))
            further.sort(key=lambda pair: -pair[0])
            new = [hypothesis for _, hypothesis in further[: width - len(kept)]]
            beams[number] = kept + new
            taken.update(words[-1] for words, _, ended, _ in new if not ended)
    groups_found = []
    for beam in beams:
        found = [
            Hypothesis(words, score if ended else model.log_probability([*words, EOS]), True)
            for words, score, ended, _ in beam
        ]
        groups_found.append(sorted(found, key=lambda h: -rank(h, length_penalty)))
    places = zip(*groups_found, strict=True)
    return [h for place in places for h in sorted(place, key=lambda h: -rank(h, length_penalty))]


@pytest.mark.parametrize(
    ("width", "groups", "diversity"), [(4, 1, 0.5), (1, 4, 0.5), (2, 2, 0.3), (2, 3, 2.0)]
)
@pytest.mark.parametrize("seed", range(3))
def test_groups_equal_a_search_by_lists_that_never_stops_early(width, groups, diversity, seed):
    model = HistoryModel(vocabulary_size=10, images=3, seed=seed)
    places, settings = width * groups, {"groups": groups, "diversity": diversity}
    expected = [diverse(model.only(i), width, groups, diversity, 8, 0.7) for i in range(3)]
    for n_best in sorted({1, groups, min(groups + 1, places), places}):
        for found, best in zip(
            find(model, places, 8, n_best=n_best, **settings), expected, strict=True
        ):
            assert len(best) == places
            assert len(found) == n_best
            assert all(map(same, found, best))


@pytest.mark.parametrize(("width", "groups"), [(1, 3), (2, 3), (5, 2)])
def test_without_diversity_each_group_is_a_beam_search_of_its_own(width, groups):
    model, rules = (
        HistoryModel(10, images=6, seed=2),
        {"no_repeat_word": True, "forbidden_endings": (4, 5)},
    )
    places, settings = width * groups, {"groups": groups, "diversity": 0.0}
    found = find(model, places, 7, rules, n_best=places, **settings)
    alone = find(model, width, 7, rules, n_best=width)
    assert found == [[each for each in best for _ in range(groups)] for best in alone]


def test_groups_that_must_differ_do():
    model = HistoryModel(vocabulary_size=24, images=6, seed=3, eos=-30.0)
    settings = {"diversity": 1000.0, "n_best": 4, "groups": 4}
    for found in find(model, 4, 5, **settings):  # no word comes twice at the same place
        places = zip(*(caption.token_ids for caption in found), strict=True)
        assert [len(set(words)) for words in places] == [4] * 5
    for image, found in enumerate(find(model, 12, 5, **settings)):  # the best of each group
        assert len({caption.token_ids[0] for caption in found}) == 4
        for caption in found:
            assert_scored_by(model.only(image), caption)
    alike = find(model, 12, 5, n_best=4)
    assert any(len({caption.token_ids[0] for caption in found}) < 4 for found in alike)


# --- settings ---------------------------------------------------------------------------------

VOCABULARY = Vocabulary.from_captions(["a man on a red horse", "the horse with a man", "dogs run"])


def ids(text: str) -> tuple[int, ...]:
    return tuple(VOCABULARY.words.index(word) for word in text.split())


def test_rules_of_settings():
    found = Constraints.from_config(
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
    assert sorted(found.forbidden_endings) == sorted(
        ids(" ".join(FUNCTION_WORDS & {*VOCABULARY.words}))
    )
    assert {VOCABULARY.words[word] for word in found.forbidden_endings} == {
        "a",
        "on",
        "the",
        "with",
    }
    assert (found.min_length, found.max_length) == (2, 9)
    assert (found.no_repeat_ngram, found.no_repeat_word) == (3, True)
    assert found.forbidden == (ids("dogs"), ids("a red horse"))  # zebra is never written anyway
    assert found.forced == (ids("man"), ids("on a"))
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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"samples": 2, "beam_size": 4, "groups": 2},
            "samples and search.groups can't be combined",
        ),
        ({"samples": 2, "forced": ("a",)}, "samples and search.forced can't be combined"),
        ({"beam_size": 4, "groups": 2, "forced": ("a",)}, "groups and search.forced can't be"),
        ({"n_best": 6}, "n_best: at most search.beam_size = 5 was expected, found 6"),
        ({"n_best": 3, "samples": 2}, "n_best: at most search.samples = 2 was expected, found 3"),
        ({"groups": 2}, "groups: a divisor of search.beam_size = 5 was expected, found 2"),
        ({"groups": 10}, "groups: a divisor of search.beam_size = 5"),
        ({"groups": 0}, "groups: at least 1"),
        ({"temperature": 0.5}, "temperature has no effect without search.samples"),
        ({"top_k": 5}, "top_k has no effect without search.samples"),
        ({"top_p": 0.5}, "top_p has no effect without search.samples"),
        ({"diversity": 0.7}, "diversity has no effect without search.groups"),
        ({"min_length": 21}, "min_length: at most search.max_length = 20 was expected, found 21"),
        ({"samples": 1, "top_p": 1.5}, "top_p: at most 1 was expected, found 1.5"),
        ({"samples": 1, "top_p": 0.0}, "top_p: a number above 0"),
        ({"samples": 1, "temperature": 0.0}, "temperature: at least 1e-06"),
        ({"samples": -1}, "samples: at least 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram: at least 0"),
    ],
)
def test_settings_that_contradict_are_refused(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        SearchConfig(**settings)


def test_every_setting_is_explained():
    explained = attribute_docs(SearchConfig)
    assert list(explained) == [field.name for field in fields(SearchConfig)]
    assert all(len(text) > 10 and text.endswith(".") for text in explained.values())
    assert explained["beam_size"] == "Hypotheses kept; 1 is greedy search."
    assert explained["groups"].startswith("Diverse beam search: the beam is divided")
    assert explained["groups"].endswith("took at the same step.")


# --- the command ------------------------------------------------------------------------------


def captions_of(checkpoint, drawn, output, *options):
    assert run_caption(checkpoint, drawn.images, output, "--precision", "float32", *options) == 0
    return read_results(output)


def test_the_command_keeps_to_rules(checkpoint, drawn, tmp_path):
    def texts(*options):
        found = captions_of(checkpoint, drawn, tmp_path / "captions.json", *options)
        return [text.split() for text in found.values()]

    long = ("--min-length", 6)
    assert any(len(set(words)) < len(words) for words in texts(*long))
    for words in texts(*long, "--no-repeat-ngram", 1):
        assert len(set(words)) == len(words) >= 6
    before, after = texts(), texts("--forbidden", "blue", "on white")
    assert any(holds(words, ("on", "white")) for words in before)
    assert not any("blue" in words or holds(words, ("on", "white")) for words in after)
    assert all(holds(words, ("green", "disc")) for words in texts("--forced", "green disc"))


def test_the_command_writes_the_n_best(checkpoint, drawn, captioner, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    best = captions_of(checkpoint, drawn, output, "--n-best", 3, "--batch-size", 3)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    expected = captioner.describe(drawn.paths, n_best=3)
    for row, captions in zip(rows, expected, strict=True):
        assert row["captions"] == [caption.text for caption in captions]
        assert len(set(row["captions"])) == 3
        scores = [caption.log_probability for caption in captions]
        assert row["log_probabilities"] == pytest.approx(scores, abs=1e-4)
        assert row["caption"] == best[row["image_id"]] == row["captions"][0]
    for suffix in (".json", ".csv"):
        other = tmp_path / f"other{suffix}"
        assert run_caption(checkpoint, drawn.images, other, "--n-best", 3) == 2
        assert "3 captions of an image (search.n_best) need a name that ends in .jsonl" in (
            capsys.readouterr().err
        )
        assert not other.exists()


def test_the_command_says_when_nothing_is_found(checkpoint, drawn, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    options = ("--forced", "a red", "a blue", "--no-repeat-ngram", 1, "--n-best", 2)
    assert set(captions_of(checkpoint, drawn, output, *options).values()) == {""}
    assert "8 captions are empty, no caption that met the settings" in capsys.readouterr().err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(row["log_probabilities"] == [None] for row in rows)


def test_the_command_samples_by_seed_and_image_alone(checkpoint, drawn, tmp_path):
    """Neither batches nor the order of images, nor which others there are, change a sample."""
    content = json.loads(drawn.annotations.read_text())
    listed, output = tmp_path / "listed.json", tmp_path / "captions.jsonl"

    def sampled(images, seed, batch_size):
        listed.write_text(json.dumps({"images": images, "annotations": []}))
        options = ("--annotations", listed, "--batch-size", batch_size, "--seed", seed)
        options += ("--samples", 4, "--n-best", 4, "--temperature", 6.0)
        captions_of(checkpoint, drawn, output, *options)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return {row["image_id"]: row["captions"] for row in rows}

    images = content["images"]
    first = sampled(images, 0, 8)
    assert len({text for captions in first.values() for text in captions}) > 16
    assert sampled(images, 0, 8) == first
    assert sampled(images[::-1], 0, 3) == first
    some = sampled(images[2:5], 0, 2)
    assert some == {image["id"]: first[image["id"]] for image in images[2:5]}
    assert sampled(images, 1, 8) != first


def test_one_text_where_a_list_is_meant_is_refused():
    for name in ("forced", "forbidden"):
        with pytest.raises(ConfigError, match=f"search.{name}: a list of words and phrases"):
            SearchConfig(**{name: "dog"})


class HostCopies(TorchFunctionMode):
    """Counts the tensors that are made of Python values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.tensor, torch.as_tensor)
        return function(*args, **(kwargs or {}))


def test_constants_go_to_the_device_once_and_not_at_each_step():
    constraints = Constraints(
        max_length=12,
        min_length=12,
        forbidden_endings=(4, 5),
        forbidden=((6,), (7, 8)),
        no_repeat_ngram=3,
    )
    copies = []
    for max_length in (6, 12):
        model = HistoryModel(vocabulary_size=10, images=3, seed=1)
        limits = {"max_length": max_length, "min_length": max_length}
        search = SearchConfig(beam_size=3, **limits)
        with HostCopies() as mode:
            decode(model.step, model.state, model.memory, search, replace(constraints, **limits))
        copies.append(mode.count)
    assert copies[0] == copies[1] > 0
