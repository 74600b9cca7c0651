"""Captions ranked by what their image lets expect: beside CIDEr, least squares, and by hand."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.data.vocabulary import Vocabulary
from captioner.errors import CheckpointError, ConfigError
from captioner.inference.captioner import Captioner
from captioner.metrics.cider import DocumentFrequencies, cider
from captioner.models.checkpoint import load_checkpoint, save_checkpoint
from captioner.models.consensus import Consensus
from captioner.search.consensus import Ngrams, rerank
from captioner.search.hypothesis import Hypothesis
from captioner.search_config import SearchConfig
from captioner.training.consensus import fit_consensus
from tools import average_checkpoints
from tools import fit_consensus as command

WORDS = ["a", "dog", "cat", "runs", "sits", "on", "grass", "red"]
CAPTION = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8)


def fit(features, captions, size=10_000, rank=1000, ridge=0.0) -> Consensus:
    vocabulary = Vocabulary.from_tokens([words for image in captions for words in image])
    return fit_consensus(np.array(features, float), captions, vocabulary, size, rank, ridge)


@given(
    st.lists(st.lists(CAPTION, min_size=1, max_size=3), min_size=4, max_size=8),
    CAPTION,
)
@settings(max_examples=60, deadline=None)
def test_agreement_with_what_captions_say_is_their_cider(captions, hypothesis):
    """With a feature of its own for each image the expectation is its captions' own vector.

    N-grams that no image has are as rare in both as those of one.
    """
    consensus = fit(np.eye(len(captions)), captions)
    expected = consensus.expected(torch.eye(len(captions)).unsqueeze(1)).numpy()
    words = sorted({word for image in captions for words in image for word in words})
    hypothesis = [word for word in hypothesis if word in words] or words[:1]
    vocabulary = Vocabulary.from_tokens([words for image in captions for words in image])
    token_ids = vocabulary.encode_tokens(hypothesis)
    frequencies = DocumentFrequencies.of(captions)
    _, plain = cider([hypothesis] * len(captions), captions, frequencies)
    found = [consensus.ngrams.agreement(token_ids, row) for row in expected]
    np.testing.assert_allclose(found, plain, atol=0.15)  # matrices are rounded to 8 bits


def test_agreement_by_hand():
    """Two words of rarity 1 and 2, one n-gram unknown: (1 x 0.5 + 2 x 0.25) / sqrt(1 + 4)."""
    ngrams = Ngrams(np.array([[4, -1, -1, -1], [5, -1, -1, -1]]), np.array([1.0, 2.0]), 3.0)
    expected = np.array([0.5, 0.25])
    assert ngrams.agreement([4, 5], expected) == pytest.approx(10 / 4 / 5**0.5)
    # Twice the first: (2 x 0.5 + 2 x 0.25) / sqrt(4 + 4); pairs are unknown, and weigh nothing.
    assert ngrams.agreement([4, 5, 4], expected) == pytest.approx(10 / 4 * 1.5 / 8**0.5)
    assert ngrams.agreement([6], expected) == ngrams.agreement([], expected) == 0
    content = json.loads(json.dumps(ngrams.content()))
    assert Ngrams.of_content(content).agreement([4, 5], expected) == pytest.approx(10 / 4 / 5**0.5)


def test_rerank_by_hand():
    ngrams = Ngrams(np.array([[4, -1, -1, -1], [5, -1, -1, -1]]), np.array([1.0, 1.0]), 1.0)
    found = [Hypothesis([4], -1.0, True), Hypothesis([5], -2.0, True), Hypothesis([5], 0.0, False)]
    for consensus, chosen in ((0.1, [4]), (3.0, [5])):  # the difference is 0.5 x 10 / 4
        search = SearchConfig(length_penalty=0.0, consensus=consensus)
        ((best,),) = rerank([found], np.array([[0.0, 0.5]]), ngrams, search)
        assert best.token_ids == chosen
        assert best.ended  # whatever else: a caption that found its end goes before
    assert best.score(0.0, 3.0) == pytest.approx(-2.0 + 3.0 * 0.5 * 10 / 4)


def test_the_regression_is_least_squares_and_its_rank_the_best():
    random = np.random.default_rng(0)
    features = random.normal(size=(200, 6))
    captions = [
        [[WORDS[int(value > 0) + 2 * place] for place, value in enumerate(row[:4])]]
        for row in features
    ]
    consensus = fit(features, captions)
    found = consensus.expected(torch.tensor(features).unsqueeze(1)).double().numpy()
    # The targets: what a regression with as many features as images says.
    own = fit(np.eye(len(captions)), captions)
    assert (own.ngrams.token_ids == consensus.ngrams.token_ids).all()
    targets = own.expected(torch.eye(len(captions)).unsqueeze(1)).double().numpy()
    ones = np.column_stack([features, np.ones(len(features))])
    fitted = ones @ np.linalg.lstsq(ones, targets, rcond=None)[0]
    assert np.abs(found - fitted).max() < 0.02
    # No approximation of rank 2 of what is fitted is nearer than the singular vectors'.
    low = fit(features, captions, rank=2)
    of_low = low.expected(torch.tensor(features).unsqueeze(1)).double().numpy()
    centre = fitted.mean(0)
    u, s, v = np.linalg.svd(fitted - centre, full_matrices=False)
    best = centre + u[:, :2] * s[:2] @ v[:2]
    assert np.abs(of_low - best).max() < 0.02


def test_a_few_ngrams_are_the_commonest():
    captions = [[["a", "dog"]]] * 5 + [[["a", "cat"]]] * 2
    consensus = fit(np.eye(7), captions, size=3)
    vocabulary = Vocabulary.from_tokens([words for image in captions for words in image])
    a, dog = vocabulary.encode_tokens(["a", "dog"])
    rows = {tuple(row[row >= 0].tolist()) for row in consensus.ngrams.token_ids}
    assert rows == {(a,), (dog,), (a, dog)}
    assert consensus.ngrams.unseen == pytest.approx(np.log(7 / 2))


# --- with a captioner ---------------------------------------------------------------------------


@pytest.fixture
def fitted(checkpoint, drawn, tmp_path):
    """The tiny model's checkpoint, with a consensus of the drawn images' captions."""
    folder = tmp_path / "fitted"
    words = [checkpoint, "--annotations", drawn.annotations, "--images", drawn.images]
    options = ["--output", folder, "--weight", 0.5, "--device", "cpu", "--ngrams", 40, "--rank", 7]
    assert command.main([str(word) for word in (*words, *options)]) == 0
    return folder


def test_a_fitted_checkpoint_ranks_by_it(fitted, drawn):
    captioner = Captioner.from_pretrained(fitted, "cpu", "float32")
    assert captioner.model.search.consensus == 0.5
    assert captioner.caption(drawn.paths) == list(drawn.captions.values())
    for path in drawn.paths:
        plain = captioner.describe(path, beam_size=4, n_best=4, consensus=0)
        pixels = captioner.preprocessing.load(path)[None]
        (expected,) = captioner.model.consensus.expected(captioner.features(pixels)[0]).numpy()
        vocabulary, ngrams = captioner.model.vocabulary, captioner.model.consensus.ngrams
        scores = {
            each.text: each.score + 50 * ngrams.agreement(vocabulary.encode(each.text), expected)
            for each in plain
        }
        found = captioner.describe(path, beam_size=4, n_best=3, consensus=50)
        assert [each.text for each in found] == sorted(scores, key=scores.get, reverse=True)[:3]
        for each in found:
            assert each.score == pytest.approx(scores[each.text], abs=1e-3)
    # Samples are ranked too.
    drawn_at_random = captioner.describe(drawn.paths[0], samples=8, n_best=8, consensus=50)
    scores = [each.score for each in drawn_at_random]
    assert scores == sorted(scores, reverse=True)


def test_a_checkpoint_keeps_its_consensus(fitted, tmp_path):
    model = load_checkpoint(fitted)
    again = tmp_path / "again"
    again.mkdir()
    save_checkpoint(model, again, {}, torch.float16)
    one, other = model.consensus.tensors(), load_checkpoint(again).consensus.tensors()
    assert all(torch.equal(one[name], other[name]) for name in one)
    modes = {path.stat().st_mode for path in again.iterdir()}
    assert len(modes) == 1  # who may read one file may read all


def test_an_average_has_none(fitted, tmp_path):
    words = [fitted, fitted, "--output", tmp_path / "averaged"]
    assert average_checkpoints.main([str(word) for word in words]) == 0
    model = load_checkpoint(tmp_path / "averaged")
    assert (model.consensus, model.search.consensus) == (None, 0.0)


def test_captioners_without_consensus(captioner, checkpoint, drawn):
    with pytest.raises(ConfigError, match=r"search.consensus: this captioner has none"):
        captioner.caption(drawn.paths[0], consensus=1.0)
    path = checkpoint / "config.json"
    content = json.loads(path.read_text())
    content["search"]["consensus"] = 1.0
    path.write_text(json.dumps(content))
    (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: search.consensus needs consensus"):
        load_checkpoint(checkpoint)


def test_damaged_files_are_refused(fitted):
    path = fitted / "consensus.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"consensus.safetensors: not what was saved"):
        load_checkpoint(fitted)
    (fitted / "SHA256SUMS").unlink()
    tensors = load_checkpoint(fitted).consensus.tensors()
    nan = tensors["bias"].clone().fill_(float("nan"))
    for damage in (
        {"bias": nan},
        {"bias": tensors["bias"][:-1]},
        {"rarity": tensors["rarity"].double()},
        {"more": nan},
        {"inner": torch.tensor(1.0)},
        {"outer": nan},
        {"inner": tensors["inner"][:-1].clone()},
    ):
        path.write_bytes(safetensors.torch.save(tensors | damage))
        with pytest.raises(CheckpointError, match=r"consensus.safetensors: ") as caught:
            load_checkpoint(fitted)
        assert "\n" not in str(caught.value)
    path.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match=r"consensus.safetensors: "):
        load_checkpoint(fitted)


def test_what_cannot_be_fitted(checkpoint, drawn, tmp_path, capsys):
    words = [checkpoint, "--annotations", drawn.annotations, "--images"]
    empty = tmp_path / "empty"
    empty.mkdir()
    for options, code, message in (
        ([drawn.images, "--output", checkpoint], 2, "it is there already"),
        ([drawn.images, "--output", tmp_path / "new", "--rank", 0], 2, "--rank: more than 0"),
        ([empty, "--output", tmp_path / "new"], 1, "0 images can be read"),
    ):
        assert command.main([str(word) for word in (*words, *options)]) == code
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
