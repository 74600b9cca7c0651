"""Rewards equal the scores of ``cider`` and ``bleu``, with the end as a word of both sides."""

import numpy as np
import pytest

from captioner.data.vocabulary import EOS, PAD
from captioner.errors import DataError
from captioner.metrics.bleu import bleu_counts, bleu_of_counts
from captioner.metrics.cider import DocumentFrequencies, cider
from captioner.metrics.reward import CaptionReward

WORDS = 12  # few words, so that captions share many n-grams


def draw_captions(random, count, shortest=1):
    lengths = random.integers(shortest, 14, size=count)
    return [random.integers(4, WORDS, size=length).tolist() for length in lengths]


def as_words(token_ids):
    return [str(token) for token in token_ids]


@pytest.fixture(scope="module")
def references():
    random = np.random.default_rng(1)
    return [draw_captions(random, random.integers(1, 7)) for _ in range(40)]


def padded(captions, length=16):
    rows = [[*c, EOS, *[PAD] * (length - len(c) - 1)] for c in captions]
    return np.array(rows)


def test_rewards_are_those_of_the_metrics(references):
    random = np.random.default_rng(2)
    images = random.integers(len(references), size=50)
    # Captions by chance, some of them copies of a reference, some without a word.
    captions = [draw_captions(random, 3, shortest=0) for _ in images]
    for of_image, image in zip(captions[::3], images[::3], strict=True):
        of_image[1] = references[image][0]
    token_ids = np.stack([padded(of_image) for of_image in captions])

    words = [[as_words([*c, EOS]) for c in of_image] for of_image in references]
    hypotheses = [as_words([*c, EOS]) for of_image in captions for c in of_image]
    repeated = [words[image] for image in images for _ in range(3)]
    cider_d, _ = cider(hypotheses, repeated, DocumentFrequencies.of(words))
    bleu = bleu_of_counts(bleu_counts(hypotheses, repeated))[:, 3]

    rewards = CaptionReward(references, WORDS)(images, token_ids)
    np.testing.assert_allclose(rewards.ravel(), cider_d, rtol=1e-12, atol=1e-12)
    assert cider_d.max() > 3
    only_bleu = CaptionReward(references, WORDS, cider_weight=0, bleu_weight=1)
    np.testing.assert_array_equal(only_bleu(images, token_ids).ravel(), bleu)
    both = CaptionReward(references, WORDS, cider_weight=0.5, bleu_weight=2)
    np.testing.assert_allclose(both(images, token_ids).ravel(), 0.5 * cider_d + 2 * bleu)


def test_a_caption_that_stops_in_the_middle_gets_less(references):
    reward = CaptionReward(references, WORDS)
    caption = max(references[0], key=len)
    whole = padded([caption])[np.newaxis]
    cut = whole.copy()
    cut[cut == EOS] = PAD
    assert reward(np.array([0]), cut) < reward(np.array([0]), whole)


def test_what_follows_the_end_does_not_count(references):
    reward = CaptionReward(references, WORDS)
    token_ids = padded(references[3])[np.newaxis]
    longer = token_ids.copy()
    longer[longer == PAD] = 5
    image = np.array([3])
    np.testing.assert_array_equal(reward(image, token_ids), reward(image, longer))
    # Captions as long as the array, without an end.
    token_ids = np.full((1, 1, 3), 5)
    assert reward(image, token_ids).shape == (1, 1)


def test_impossible_references_are_refused():
    with pytest.raises(DataError, match="fewer than 55,108 words"):
        CaptionReward([[[4]]], 60_000)
    with pytest.raises(DataError, match="one reference or more"):
        CaptionReward([[[4]], []], WORDS)
