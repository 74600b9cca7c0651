"""Forced phrases: in every caption, and counted correctly after any words."""

import itertools

import pytest
import torch
from step_models import HistoryModel, assert_scored_by, contains, meets, search

from captioner.search.forced_phrases import ForcedPhrases

FORCED = [((4,), (5,), (6,)), ((4, 4, 5),), ((4, 5, 4, 6),), ((4, 5, 6), (5,)), ((4, 5), (5, 6))]
FORCED += [((4, 5), (4, 6)), ((4, 5, 4, 6), (4, 6, 5))]


@pytest.mark.parametrize("phrases", FORCED, ids=str)
@pytest.mark.parametrize("beam_size", [1, 2])
def test_forced_phrases_are_in_every_caption(phrases, beam_size):
    """However narrow the beam, and where every word that there is room for must be one of them."""
    for room in (0, 1, 6):
        max_length = sum(map(len, phrases)) + room
        model = HistoryModel(10, images=30, seed=room)
        hypotheses = search(model, beam_size, max_length, {"forced": phrases}, n_best=beam_size)
        for image, captions in enumerate(hypotheses):
            for caption in captions:
                assert meets(caption.token_ids, forced=phrases)
                assert len(caption.token_ids) <= max_length
            assert_scored_by(model.only(image), captions[0])


@pytest.mark.parametrize("phrases", FORCED, ids=str)
def test_progress_is_the_longest_part_that_the_last_words_begin(phrases):
    """After any words: 4 4 4 5 contains 4 4 5, although it breaks off once."""
    forced = ForcedPhrases(phrases, 8, torch.device("cpu"))
    texts = torch.tensor(list(itertools.product([4, 5, 6, 7], repeat=6))).unsqueeze(0)
    states = forced.init_state(1).expand(-1, texts.shape[1], -1)
    for position in range(6):
        words_met_after = forced.words_met_after(states)
        states = forced.advance(states, texts[..., position])
        chosen = words_met_after.gather(2, texts[..., position : position + 1]).squeeze(2)
        assert torch.equal(chosen, forced.words_met(states))
    for text, state, met in zip(
        texts[0].tolist(), states[0].tolist(), forced.words_met(states)[0], strict=True
    ):
        for phrase, part in zip(phrases, state, strict=True):
            begun = [n for n in range(len(phrase)) if tuple(text[6 - n :]) == phrase[:n]]
            assert part == (len(phrase) if contains(text, phrase) else max(begun))
        assert (met == forced.total_words) == all(contains(text, phrase) for phrase in phrases)
