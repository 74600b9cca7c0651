"""Search: exact against brute force, greedy, batching, early stop, and models that misbehave."""

import math

import pytest
import torch
from decoder_settings import KINDS, most_layers
from step_models import INF, HistoryModel, beam_search, brute_force, constant, greedy, same

from captioner.config import DecoderConfig
from captioner.data.vocabulary import BOS, EOS, PAD, UNK
from captioner.models.captioning_model import make_decoder
from captioner.models.inference_decoder import InferenceDecoder


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_equals_brute_force(seed, length_penalty):
    model = HistoryModel(vocabulary_size=7, images=3, seed=seed, eos=-1.5 * (seed % 2))
    every = sum(3**length for length in range(5))  # 3 words, at most 4 of them
    for image, captions in enumerate(model.search(every, 4, length_penalty, n_best=every)):
        expected = brute_force(model.only(image), 4, length_penalty)
        assert len(captions) == len(expected) == every
        assert all(map(same, captions, expected))
        (best,) = model.only(image).search(every, 4, length_penalty)[0]
        assert same(best, expected[0])


@pytest.mark.parametrize("n_best", [1, 2, 5])
def test_the_n_best_are_the_first_of_all(n_best):
    model = HistoryModel(vocabulary_size=8, images=6, seed=5)
    every = model.search(400, 4, 0.7, n_best=400)
    some = model.search(400, 4, 0.7, n_best)
    for captions, expected in zip(some, every, strict=True):
        assert captions == expected[:n_best]
        assert all(hypothesis.ended for hypothesis in captions)


@pytest.mark.parametrize("seed", range(8))
def test_beam_of_one_equals_greedy(seed):
    model = HistoryModel(vocabulary_size=11, images=5, seed=seed, eos=-0.5)
    for image, (best,) in enumerate(model.search(1, 9, length_penalty=0.7)):
        assert best.token_ids == greedy(model.only(image), 9)


@pytest.mark.parametrize("beam_size", [1, 2, 5, 40])
def test_batched_equals_one_by_one(beam_size):
    model = HistoryModel(vocabulary_size=12, images=16, seed=0)
    together = model.search(beam_size, 10, 0.7, n_best=3)
    assert len({len(best[0].token_ids) for best in together}) > 3
    for image, captions in enumerate(together):
        assert captions == model.only(image).search(beam_size, 10, 0.7, n_best=3)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_decoders_batched_equal_one_by_one_and_score_as_teacher_forcing(kind, dtype):
    torch.manual_seed(24)
    config = DecoderConfig(
        kind=kind,
        layers=most_layers(kind),
        embedding_size=16,
        hidden_size=24,
        attention_size=8,
        dropout=0.5,
    )
    decoder = make_decoder(config, 30, 10).to(dtype).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4)
        decoder.embedding.weight.mul_(8)  # far from uniform: captions of many lengths
    features = torch.randn(12, 6, 10).to(dtype)
    steps = InferenceDecoder(decoder, dtype)

    def search(features):
        state, memory = steps.init_state(features)
        return beam_search(steps.step, state, memory, 4, 12, 0.7, n_best=4)

    with torch.inference_mode():
        together = search(features)
        alone = [search(features[i : i + 1])[0] for i in range(12)]
    assert len({len(best[0].token_ids) for best in together}) > 2
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for image, (captions, single) in enumerate(zip(together, alone, strict=True)):
        assert [h.token_ids for h in captions] == [h.token_ids for h in single]
        for hypothesis in captions:
            token_ids = torch.tensor([[[BOS, *hypothesis.token_ids, EOS]]])
            output = decoder.teacher_forcing(features[image : image + 1], token_ids)
            expected = output.log_probabilities().sum().item()
            assert hypothesis.log_probability == pytest.approx(expected, abs=tolerance)


def test_stops_when_no_unfinished_hypothesis_can_win():
    """Equal to the search that never stops, in fewer steps and with fewer images in each."""
    early_steps = full_steps = 0
    for seed in range(6):
        model = HistoryModel(vocabulary_size=10, images=8, seed=seed)
        hypotheses = model.search(5, 12, 0.7)
        early, early_images = len(model.sizes), sum(size[0] for size in model.sizes)
        assert [size[0] for size in model.sizes] == sorted(
            (size[0] for size in model.sizes), reverse=True
        )
        # More hypotheses wanted than there are places: goes on until all places have ended.
        full = model.search(5, 12, 0.7, n_best=5)
        assert [best[0] for best in hypotheses] == [best[0] for best in full]
        assert early_images < sum(size[0] for size in model.sizes)
        early_steps, full_steps = early_steps + early, full_steps + len(model.sizes)
    assert early_steps < full_steps


def test_finished_images_leave_the_batch():
    """Image i ends after i words: the batch loses one image at each step."""

    def step(token_ids, state, memory):
        logits = torch.full((*token_ids.shape, 6), -30.0)
        (ages,) = state
        ends = ages == memory[0].unsqueeze(1)
        logits[..., EOS] = torch.where(ends, 0.0, -30.0)
        logits[..., 4] = torch.where(ends, -30.0, 0.0)
        seen.append(memory[0].tolist())
        return logits, (ages + 1,)

    seen = []
    hypotheses = beam_search(
        step, (torch.zeros(4, 1),), (torch.tensor([2.0, 0.0, 3.0, 1.0]),), 2, 9
    )
    assert [best[0].token_ids for best in hypotheses] == [[4, 4], [], [4, 4, 4], [4]]
    assert seen == [[2, 0, 3, 1], [2, 3, 1], [2, 3], [3]]


def test_state_follows_the_hypotheses():
    """Each hypothesis carries its own history: the state must always be that of its tokens."""

    def step(token_ids, state, memory):
        history = torch.cat([state[0], token_ids.unsqueeze(2)], 2)
        histories.append(history)
        return model.step(token_ids, state[1:], memory)[0], (
            history,
            model.step(token_ids, state[1:], memory)[1][0],
        )

    model = HistoryModel(vocabulary_size=9, images=3, seed=3, eos=-9.0)
    histories = []
    state = (torch.empty((3, 1, 0), dtype=torch.long), *model.state)
    hypotheses = beam_search(step, state, model.memory, 4, 5, n_best=4)
    last = histories[-1].tolist()
    for image in range(3):
        captions = {tuple(hypothesis.token_ids) for hypothesis in hypotheses[image]}
        assert captions == {tuple(history[1:]) for history in last[image]}


@pytest.mark.parametrize("beam_size", [1, 3, 50])
def test_a_model_that_never_ends_gives_captions_all_the_same(beam_size):
    step, state = constant([0.0, 0.0, -INF, 0.0, 2.0, 1.0])
    for captions in beam_search(step, state, (), beam_size, 5, 0.7, n_best=2):
        assert captions[0].token_ids == [4] * 5
        assert not captions[0].ended
        chosen = torch.tensor([0.0, 0, -INF, 0, 2, 1]).log_softmax(0)[4]
        assert captions[0].log_probability == pytest.approx(5 * chosen.item(), rel=1e-5)


def test_hypotheses_that_end_come_before_those_that_cannot():
    def step(token_ids, state, memory):
        logits = torch.tensor([-INF, -INF, -INF, -INF, 3.0, 0.0]).repeat(*token_ids.shape, 1)
        logits[..., EOS] = torch.where(token_ids == 5, 0.0, -INF)
        return logits, state

    (hypotheses,) = beam_search(step, (torch.zeros(1, 1),), (), 9, 2, n_best=9)
    assert [(h.token_ids, h.ended) for h in hypotheses] == [
        ([5], True),
        ([4, 5], True),
        ([5, 5], True),
        ([4, 4], False),
        ([5, 4], False),
    ]


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_model_that_ends_at_once_gives_empty_captions(beam_size):
    step, state = constant([0.0, 0.0, 50.0, 0.0, 1.0, 1.0])
    for captions in beam_search(step, state, (), beam_size, 5):
        assert captions[0].token_ids == []
        assert captions[0].ended
        assert captions[0].log_probability == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("beam_size", [1, 2, 100])
def test_max_length_of_one(beam_size):
    model = HistoryModel(vocabulary_size=9, images=4, seed=2, eos=-3.0)
    for image, (best,) in enumerate(model.search(beam_size, 1)):
        assert best.ended
        if beam_size == 1:
            assert best.token_ids == greedy(model.only(image), 1)
        if beam_size == 100:
            assert same(best, brute_force(model.only(image), 1, 0.0)[0])


def test_beam_wider_than_the_vocabulary():
    model = HistoryModel(vocabulary_size=6, images=2, seed=4)
    for image, captions in enumerate(model.search(1000, 3, n_best=1000)):
        expected = brute_force(model.only(image), 3, 0.0)
        assert [h.token_ids for h in captions] == [h.token_ids for h in expected]


@pytest.mark.parametrize("forbidden", [PAD, BOS, UNK])
def test_never_writes_unk_bos_or_pad(forbidden):
    logits = [0.0] * 7
    logits[forbidden] = 20.0
    step, state = constant(logits)
    for captions in beam_search(step, state, (), 5, 4, n_best=5):
        for hypothesis in captions:
            assert not {PAD, BOS, EOS, UNK} & set(hypothesis.token_ids)
            # What can't be written keeps its probability: scores are the model's own.
            tokens = len(hypothesis.token_ids) + 1
            chosen = torch.tensor(logits).log_softmax(0)[4].item()
            assert hypothesis.log_probability == pytest.approx(tokens * chosen, rel=1e-5)


def test_equal_logits_give_the_same_captions_every_time_and_in_every_batch():
    step, state = constant([0.0] * 9, images=5)
    hypotheses = beam_search(step, state, (), 4, 6, 0.7, n_best=4)
    assert all(one == hypotheses[0] for one in hypotheses)
    again = beam_search(step, state, (), 4, 6, 0.7, n_best=4)
    assert again == hypotheses
    alone = beam_search(step, (torch.zeros(1, 1),), (), 4, 6, 0.7, n_best=4)
    assert alone[0] == hypotheses[0]


@pytest.mark.parametrize("beam_size", [1, 3, 40])
@pytest.mark.parametrize("bad_step", [0, 2, 4])
@pytest.mark.parametrize("value", [math.nan, INF])
def test_nan_is_never_taken_for_a_caption(beam_size, bad_step, value):
    """NaN logits of one image at one step, the last one too: it alone has no caption."""
    model = HistoryModel(vocabulary_size=8, images=4, seed=0, eos=-9.0)

    def step(token_ids, state, memory):
        logits, state = model.step(token_ids, state, memory)
        if len(model.sizes) == bad_step + 1:
            logits[memory[0] == model.memory[0][1], :, 4] = value
        return logits, state

    whole = model.search(beam_size, 4)
    model.sizes = []
    damaged = beam_search(step, model.state, model.memory, beam_size, 4)
    assert damaged == [whole[0], [], whole[2], whole[3]]


def test_no_images():
    model = HistoryModel(vocabulary_size=8, images=0, seed=0)
    assert model.search(3, 4) == []
