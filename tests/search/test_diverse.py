"""Diverse groups: exact against a search by lists; what groups change, and what they don't."""

from collections import Counter

import pytest
import torch
from step_models import HistoryModel, assert_scored_by, same, score, search

from captioner.data.vocabulary import BOS, EOS, PAD, UNK
from captioner.search.hypothesis import Hypothesis


def diverse(model, width, groups, diversity, max_length, length_penalty) -> list[Hypothesis]:
    """Search one image's groups by lists, to the very end; the best of each group come first."""
    beams = [[([], 0.0, False, model.state)] for _ in range(groups)]
    for _ in range(max_length):
        taken = Counter()
        for number, beam in enumerate(beams):
            kept = [hypothesis for hypothesis in beam if hypothesis[2]]
            further = []
            for words, log_prob, _, state in (h for h in beam if not h[2]):
                last = torch.tensor([[words[-1] if words else BOS]])
                logits, after = model.step(last, state, model.memory)
                for token, gain in enumerate(logits[0, 0].log_softmax(-1).tolist()):
                    if token not in (PAD, BOS, UNK):
                        new = (words, log_prob + gain, True, after)
                        if token != EOS:
                            new = ([*words, token], log_prob + gain, False, after)
                        further.append((log_prob + gain - diversity * taken[token], new))
            further.sort(key=lambda pair: -pair[0])
            new = [hypothesis for _, hypothesis in further[: width - len(kept)]]
            beams[number] = kept + new
            taken.update(words[-1] for words, _, ended, _ in new if not ended)
    groups_hypotheses = []
    for beam in beams:
        hypotheses = [
            Hypothesis(words, log_prob if ended else model.log_probability([*words, EOS]), True)
            for words, log_prob, ended, _ in beam
        ]
        groups_hypotheses.append(sorted(hypotheses, key=lambda h: -score(h, length_penalty)))
    places = zip(*groups_hypotheses, strict=True)
    return [h for place in places for h in sorted(place, key=lambda h: -score(h, length_penalty))]


@pytest.mark.parametrize(
    ("width", "groups", "diversity"), [(4, 1, 0.5), (1, 4, 0.5), (2, 2, 0.3), (2, 3, 2.0)]
)
@pytest.mark.parametrize("seed", range(3))
def test_groups_equal_a_search_by_lists_that_never_stops_early(width, groups, diversity, seed):
    model = HistoryModel(vocabulary_size=10, images=3, seed=seed)
    places, settings = width * groups, {"groups": groups, "diversity": diversity}
    expected = [diverse(model.only(i), width, groups, diversity, 8, 0.7) for i in range(3)]
    for n_best in sorted({1, groups, min(groups + 1, places), places}):
        for captions, best in zip(
            search(model, places, 8, n_best=n_best, **settings), expected, strict=True
        ):
            assert len(best) == places
            assert len(captions) == n_best
            assert all(map(same, captions, best))


@pytest.mark.parametrize(("width", "groups"), [(1, 3), (2, 3), (5, 2)])
def test_without_diversity_each_group_is_a_beam_search_of_its_own(width, groups):
    model = HistoryModel(10, images=6, seed=2)
    constraints = {"no_repeat_word": True, "forbidden_endings": (4, 5)}
    places, settings = width * groups, {"groups": groups, "diversity": 0.0}
    hypotheses = search(model, places, 7, constraints, n_best=places, **settings)
    alone = search(model, width, 7, constraints, n_best=width)
    assert hypotheses == [[h for h in captions for _ in range(groups)] for captions in alone]


def test_groups_that_must_differ_do():
    model = HistoryModel(vocabulary_size=24, images=6, seed=3, eos=-30.0)
    settings = {"diversity": 1000.0, "n_best": 4, "groups": 4}
    for captions in search(model, 4, 5, **settings):  # no word comes twice at the same place
        places = zip(*(caption.token_ids for caption in captions), strict=True)
        assert [len(set(words)) for words in places] == [4] * 5
    for image, captions in enumerate(search(model, 12, 5, **settings)):  # each group's best
        assert len({caption.token_ids[0] for caption in captions}) == 4
        for caption in captions:
            assert_scored_by(model.only(image), caption)
    alike = search(model, 12, 5, n_best=4)
    assert any(len({caption.token_ids[0] for caption in hypotheses}) < 4 for hypotheses in alike)
