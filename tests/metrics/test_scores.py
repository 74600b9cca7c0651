import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu as nltk_corpus_bleu

from captioner.data.annotations import read_annotations
from captioner.errors import DataError, UsageError
from captioner.metrics.cider import DocumentFrequencies, cider
from captioner.metrics.diversity import describe, repeats_ngram, self_bleu
from captioner.metrics.official import meteor
from captioner.metrics.rouge import longest_common_subsequence, rouge_l
from captioner.metrics.scores import (
    METRICS,
    Scores,
    UnavailableError,
    compute_metrics,
    corpus_bleu,
    metric_names,
    score,
    score_tokens,
)
from captioner.metrics.significance import confidence_interval, paired_test

SHARED = Path(__file__).parents[3] / "shared"
OFFICIAL = SHARED / "metrics/official_scores_flickr8k_val_leave_one_out.json.gz"
FAST = [name for name in METRICS if name not in ("METEOR", "SPICE")]
HAS_JAVA = shutil.which("java") is not None and find_spec("pycocoevalcap") is not None

words = st.sampled_from("a dog cat runs on the red 3/4 . man's".split())  # noqa: SIM905
captions = st.lists(words, max_size=9).map(" ".join)
corpora = st.lists(
    st.tuples(captions, st.lists(captions, min_size=1, max_size=3)), min_size=1, max_size=5
)


def split(corpus):
    return (
        {key: caption for key, (caption, _) in enumerate(corpus)},
        {key: texts for key, (_, texts) in enumerate(corpus)},
    )


def random_corpus(seed, images=30):
    generator = random.Random(seed)
    vocabulary = [f"w{n}" for n in range(12)]

    def caption(shortest):
        return generator.choices(vocabulary, k=generator.randint(shortest, 12))

    hypotheses = [caption(0) for _ in range(images)]
    return hypotheses, [[caption(1) for _ in range(generator.randint(1, 5))] for _ in hypotheses]


# --- against the official tool -------------------------------------------------------------------


@pytest.mark.skipif(not OFFICIAL.exists(), reason="needs ../shared/metrics")
def test_official_scores_of_flickr8k_val_leave_one_out():
    with gzip.open(OFFICIAL, "rt", encoding="utf-8") as file:
        official = json.load(file)
    images = read_annotations(SHARED / "data/flickr8k/annotations/captions_val.json").images
    hypotheses = {image.image_id: image.captions[0] for image in images}
    references = {image.image_id: image.captions[1:] for image in images}
    names = ["BLEU", "ROUGE-L", "CIDEr-D", *(["METEOR"] if HAS_JAVA else [])]
    scores = score(hypotheses, references, names)
    assert len(scores.corpus) == 6 + HAS_JAVA
    for name, value in scores.corpus.items():
        assert value == pytest.approx(official["corpus"][name], abs=1e-12), name
        theirs = [official["per_image"][str(key)][name] for key in hypotheses]
        assert np.abs(scores.per_image[name] - theirs).max() < 1e-12, name


@pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap")
@pytest.mark.parametrize("seed", range(8))
def test_official_scorers_on_any_input(seed, capsys):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses, references = random_corpus(seed)
    hypotheses[0], hypotheses[1], hypotheses[2] = [], ["w1"], ["unheard", "of"]
    references[3], hypotheses[3] = [[]], []
    hypotheses[4] = ["w1"] * 80
    given = {key: [" ".join(caption)] for key, caption in enumerate(hypotheses)}
    truth = {key: [" ".join(c) for c in texts] for key, texts in enumerate(references)}
    ours = score_tokens(hypotheses, references, FAST)
    values, per_image = Bleu(4).compute_score(truth, given, verbose=0)
    for order in range(4):
        name = f"BLEU-{order + 1}"
        assert ours.corpus[name] == pytest.approx(values[order], abs=1e-12)
        assert np.allclose(ours.per_image[name], per_image[order], atol=1e-12, rtol=0)
    for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr-D", Cider())):
        value, images = scorer.compute_score(truth, given)
        assert ours.corpus[name] == pytest.approx(value, abs=1e-12)
        assert np.allclose(ours.per_image[name], images, atol=1e-12, rtol=0)


# --- BLEU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_bleu_is_nltks_on_sound_input(seed):
    hypotheses, references = random_corpus(seed)
    hypotheses = [[*caption, "w0", "w1", "w2", "w3"] for caption in hypotheses]
    references[0] = [hypotheses[0]]
    weights = [tuple([1 / order] * order) for order in range(1, 5)]
    expected = nltk_corpus_bleu(references, hypotheses, weights=weights)
    assert list(corpus_bleu(hypotheses, references).values()) == pytest.approx(expected, abs=1e-10)


def test_bleu_of_short_captions_is_the_official_tools():
    # One word of one: no bigram at all, where nltk counts one: (0 + 1e-15) / (0 + 1e-9).
    scores = corpus_bleu([["dog"]], [[["dog"]]])
    assert scores["BLEU-1"] == pytest.approx(1, abs=1e-8)
    assert scores["BLEU-2"] == pytest.approx(1e-3, rel=1e-6)


def test_the_closest_reference_length_is_the_shorter_one_of_two():
    assert corpus_bleu([["a"] * 4], [[["a"] * 3, ["a"] * 5]])["BLEU-1"] == pytest.approx(
        0.75 / 1 + 0.25
    )
    assert corpus_bleu([["a"] * 2], [[["a"] * 4]])["BLEU-1"] == pytest.approx(math.exp(1 - 2))


# --- ROUGE-L -------------------------------------------------------------------------------------


def test_longest_common_subsequence_against_all_subsequences():
    generator = random.Random(0)
    for _ in range(100):
        first, second = (generator.choices("abc", k=generator.randint(0, 7)) for _ in range(2))
        common = max(
            len(picked)
            for size in range(len(first) + 1)
            for picked in itertools.combinations(first, size)
            if is_subsequence(picked, second)
        )
        assert longest_common_subsequence(first, second) == common


def is_subsequence(picked, sequence):
    rest = iter(sequence)
    return all(word in rest for word in picked)


def test_rouge_takes_the_best_precision_and_the_best_recall_separately():
    # Against "a b c d": precision 2/2, recall 2/4. Against "a": precision 1/2, recall 1.
    assert rouge_l([["a", "b"]], [[list("abcd"), ["a"]]])[0] == pytest.approx(1)
    assert rouge_l([["a", "b"]], [[list("abcd")]])[0] == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))
    assert rouge_l([[]], [[[]]])[0] == 1
    assert rouge_l([[]], [[["a"]]])[0] == 0


# --- CIDEr ---------------------------------------------------------------------------------------


def slow_cider(hypotheses, references, clip):
    """The paper's equations, one n-gram at a time."""

    def grams(caption, n):
        return Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))

    scores = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        total = 0.0
        for n, reference in itertools.product(range(1, 5), texts):

            def weigh(caption, n=n):
                return {
                    gram: count
                    * math.log(
                        len(references)
                        / max(
                            1,
                            sum(
                                any(gram in grams(text, n) for text in image)
                                for image in references
                            ),
                        )
                    )
                    for gram, count in grams(caption, n).items()
                }

            own, theirs = weigh(hypothesis), weigh(reference)
            dot = sum(
                (min(weight, theirs.get(gram, 0)) if clip else weight) * theirs.get(gram, 0)
                for gram, weight in own.items()
            )
            norm = math.sqrt(sum(w * w for w in own.values()) * sum(w * w for w in theirs.values()))
            bigrams = max(0, len(hypothesis) - 1) - max(0, len(reference) - 1)
            penalty = math.exp(-(bigrams**2) / 72) if clip else 1
            total += penalty * dot / norm if norm else 0
        scores.append(10 * total / 4 / len(texts))
    return scores


def test_cider_is_the_papers_equations():
    hypotheses, references = random_corpus(5, images=8)
    clipped, plain = cider(hypotheses, references)
    assert clipped == pytest.approx(slow_cider(hypotheses, references, clip=True))
    assert plain == pytest.approx(slow_cider(hypotheses, references, clip=False))


def test_saved_frequencies_are_those_of_the_references(tmp_path):
    hypotheses, references = random_corpus(1)
    DocumentFrequencies.of(references).save(tmp_path / "df.json")
    loaded = DocumentFrequencies.load(tmp_path / "df.json")
    assert loaded.images == len(references)
    expected = cider(hypotheses, references)
    assert np.array_equal(cider(hypotheses, references, loaded), expected)
    # One image alone scores 0 by its own frequencies, and the same as before by the corpus's.
    assert cider(hypotheses[5:6], references[5:6])[0][0] == 0
    assert cider(hypotheses[5:6], references[5:6], loaded)[0][0] == pytest.approx(expected[0][5])


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"counts": {}}',
        '{"images": 0, "counts": {}}',
        '{"images": 3, "counts": {"a dog": "2"}}',
        '{"images": 3, "counts": {"a dog": 4}}',
    ],
)
def test_other_files_are_no_frequencies(tmp_path, content):
    (tmp_path / "df.json").write_text(content)
    with pytest.raises(DataError, match=r"df\.json"):
        DocumentFrequencies.load(tmp_path / "df.json")


# --- all of them ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(corpora)
def test_no_input_crashes_and_scores_stay_in_range(corpus):
    scores = score(*split(corpus), FAST)
    assert list(scores.corpus) == FAST
    for name, values in scores.per_image.items():
        top = 10 if name.startswith("CIDEr") else 1
        assert values.shape == (len(corpus),)
        assert np.all((values >= 0) & (values <= top + 1e-9)), name
        assert 0 <= scores.corpus[name] <= top + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.text(max_size=30), min_size=1, max_size=4))
def test_any_text_can_be_scored(texts):
    scores = compute_metrics(texts, {key: [text, "a dog"] for key, text in texts.items()}, FAST)
    assert all(math.isfinite(value) for value in scores.values())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "dog", "red", "cat"]), min_size=4, max_size=9)))
def test_identical_captions_score_one(captions):
    texts = {key: " ".join(words) for key, words in enumerate([["a", "b", "c", "d"], *captions])}
    references = {key: ["something else entirely", text] for key, text in texts.items()}
    scores = compute_metrics(texts, references, ["BLEU", "ROUGE-L"])
    assert list(scores.values()) == pytest.approx([1] * 5, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(corpora, st.randoms())
def test_order_and_ids_change_nothing(corpus, generator):
    hypotheses, references = split(corpus)
    keys = list(hypotheses)
    generator.shuffle(keys)
    moved = {f"id {key}": hypotheses[key] for key in keys}
    shuffled = {}
    for key in sorted(keys, reverse=True):
        texts = list(references[key])
        generator.shuffle(texts)
        shuffled[f"id {key}"] = texts
    expected = compute_metrics(hypotheses, references, FAST)
    assert compute_metrics(moved, shuffled, FAST) == pytest.approx(expected, abs=1e-12)


def test_a_fraction_is_one_word_for_rouge_and_two_for_bleu():
    scores = score({1: "22 3/4"}, {1: ["22 3/4 cups"]}, ["BLEU-1", "ROUGE-L"])
    assert scores.bleu_counts[0, 8:].tolist() == [2, 3]
    assert scores.corpus["ROUGE-L"] == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))


def test_names_of_metrics():
    assert metric_names(["bleu", "cider-d"]) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr-D"]
    assert metric_names(["all"]) == list(METRICS)
    assert list(compute_metrics({1: "a"}, {1: ["a"]}, ["BLEU-4"])) == ["BLEU-4"]
    assert metric_names("BLEU-1, cider-d") == ["BLEU-1", "CIDEr-D"]
    assert list(compute_metrics({1: "a"}, {1: ["a"]}, "BLEU-4,ROUGE-L")) == ["BLEU-4", "ROUGE-L"]
    with pytest.raises(UsageError, match="did you mean 'CIDEr-D'"):
        metric_names(["CIDERD"])
    for nothing in ("", " , ", []):
        with pytest.raises(UsageError, match="no metric is named; there are all, BLEU, BLEU-1"):
            compute_metrics({1: "a"}, {1: ["a"]}, nothing)
    with pytest.raises(UsageError, match="a metric's name must be text, found 4"):
        metric_names([4])


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ({1: "a", 2: "b"}, {1: ["a"]}, "1 captions are of images that the references don't have "
         "(ids 2)"),
        ({1: "a"}, {1: ["a"], 2: ["b"]}, "1 of 2 images of the references have no caption (ids 2)"),
        ({1: "a"}, {1: []}, "1 images have no reference (ids 1)"),
        ({}, {}, "there is no image to score"),
        ({}, {1: []}, "there is no image to score"),
        ({1: "a"}, {"1": ["a"]}, "did you mean '1', as in the references, by 1? they differ only "
         "in type"),
        ({"A.jpg": "a"}, {"a.jpg": ["a"]}, "they differ only in upper and lower case"),
        ({1: "a"}, {1: "a dog"}, "references: image 1 must have a list of captions, found 'a dog'"),
        ({1: "a"}, {1: None}, "references: image 1 must have a list of captions, found None"),
        ({1: "a"}, {1: ["a", 3]}, "references: the captions of image 1 must be texts, found 3"),
        ({1: ["a dog"]}, {1: ["a"]}, "hypotheses: image 1 must have one caption, a text; found "
         "['a dog']"),
        ({1: None}, {1: ["a"]}, "hypotheses: image 1 must have one caption, a text; found None"),
        (["a dog"], {1: ["a"]}, "hypotheses: a dict by image id was expected, found ['a dog']"),
        ({1: "a dog"}, [["a"]], "references: a dict by image id was expected, found [['a']]"),
    ],
)  # fmt: skip
def test_sides_that_do_not_fit_are_refused(hypotheses, references, message):
    with pytest.raises(DataError, match=re.escape(message)):
        compute_metrics(hypotheses, references)


def test_a_file_name_is_no_document_frequencies():
    with pytest.raises(DataError, match=r"DocumentFrequencies\.load .* found 'df.json'"):
        compute_metrics({1: "a"}, {1: ["a"]}, "CIDEr-D", frequencies="df.json")


def test_references_may_be_any_collection_of_texts():
    expected = compute_metrics({1: "a dog"}, {1: ["a dog", "a cat"]})
    assert compute_metrics({1: "a dog"}, {1: ("a dog", "a cat")}) == expected
    assert compute_metrics({1: "a dog"}, {1: {"a dog": 1, "a cat": 2}.keys()}) == expected


def test_a_missing_tool_is_named_and_the_other_scores_come(monkeypatch):
    monkeypatch.setenv("PATH", "")
    scores = score({1: "a dog"}, {1: ["a dog"]}, ["BLEU-1", "METEOR", "SPICE"])
    assert list(scores.corpus) == ["BLEU-1"]
    assert list(scores.unavailable) == ["METEOR", "SPICE"]
    assert "java" in scores.unavailable["METEOR"] or "pycocoevalcap" in scores.unavailable["METEOR"]


@pytest.mark.skipif(not HAS_JAVA, reason="needs Java and pycocoevalcap")
def test_a_java_that_stops_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    scores = score({1: "a dog"}, {1: ["a dog"]}, ["BLEU-1", "METEOR"])
    assert list(scores.corpus) == ["BLEU-1"]
    assert "Java stopped" in scores.unavailable["METEOR"]
    with pytest.raises(UnavailableError):
        compute_metrics({1: "a dog"}, {1: ["a dog"]}, ["METEOR"])


@pytest.mark.skipif(not HAS_JAVA, reason="needs Java and pycocoevalcap")
def test_meteor_takes_any_tokens():
    corpus, images = meteor([[], ["a", "|||", "b"], ["猫"]], [[["a"]], [["a", "b"]], [["猫"], []]])
    assert images.tolist() == pytest.approx([0, 1, 1], abs=0.01)
    assert 0 < corpus <= 1


# --- how sure, how varied ------------------------------------------------------------------------


def scores_of(values):
    values = np.array(values, dtype=float)
    return Scores({"ROUGE-L": float(values.mean())}, {"ROUGE-L": values})


def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = confidence_interval(scores_of(values), "ROUGE-L")
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=2e-3)


def test_interval_of_bleu_holds_it_and_narrows():
    widths = []
    for images in (50, 800):
        scores = score_tokens(*random_corpus(3, images), ["BLEU-1"])
        low, high = confidence_interval(scores, "BLEU-1")
        assert low < scores.corpus["BLEU-1"] < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2.5


def test_paired_test():
    generator = np.random.default_rng(1)
    first = generator.normal(0.5, 0.1, 300)
    assert paired_test(scores_of(first), scores_of(first), "ROUGE-L") == 1
    assert paired_test(scores_of(first), scores_of(first + 0.01), "ROUGE-L") < 0.01
    ps = [
        paired_test(scores_of(a), scores_of(b), "ROUGE-L", samples=200)
        for a, b in generator.normal(0.5, 0.1, (200, 2, 30))
    ]
    assert 0.01 < np.mean(np.array(ps) < 0.05) < 0.1  # as often wrong as it says


def test_paired_test_of_bleu_finds_better_captions():
    hypotheses, references = random_corpus(2, images=100)
    better = [
        texts[0] if place % 3 == 0 else hypotheses[place] for place, texts in enumerate(references)
    ]
    first, second = (score_tokens(given, references, ["BLEU-4"]) for given in (hypotheses, better))
    assert second.corpus["BLEU-4"] > first.corpus["BLEU-4"]
    assert paired_test(first, second, "BLEU-4") < 0.01


def test_descriptions_of_captions():
    texts = [["a", "dog", "dog"], ["a", "cat", "on", "a"], []]
    found = describe(texts, training=[["a", "dog", "dog"]])
    assert found["distinct-1"] == pytest.approx(4 / 7)
    assert found["distinct-2"] == pytest.approx(5 / 5)
    assert found["vocabulary"] == 4
    assert (found["length_mean"], found["length_min"], found["length_max"]) == (7 / 3, 0, 4)
    assert found["ends_in_function_word"] == found["repeats_ngram"] == found["empty"] == 1 / 3
    assert found["novel"] == 2 / 3


@pytest.mark.parametrize(
    ("caption", "repeats"),
    [("a dog a dog", True), ("a b c d a b c", True), ("a dog and a cat", False), ("", False)],
)
def test_repeated_ngrams(caption, repeats):
    assert repeats_ngram(caption.split()) is repeats


def test_self_bleu():
    same = [["a", "red", "dog", "runs"]] * 3
    assert self_bleu([same]) == pytest.approx(1, abs=1e-6)
    assert self_bleu([[list("abcd"), list("efgh")]]) < 0.01
    assert math.isnan(self_bleu([[["a"]]]))
