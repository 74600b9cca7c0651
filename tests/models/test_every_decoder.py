"""Every decoder works everywhere: exact search, attention maps, checkpoints, the precisions."""

import copy
import itertools

import pytest
import torch
from decoder_settings import ATTENDING_KINDS, KINDS, KINDS_AND_CELLS, most_layers

from captioner.config import DecoderConfig, SearchConfig
from captioner.data.vocabulary import BOS, EOS, Vocabulary
from captioner.device import computes_bfloat16
from captioner.inference.captioner import Captioner
from captioner.models.captioning_model import CaptioningModel, generate, make_decoder
from captioner.models.checkpoint import load_checkpoint, save_checkpoint
from captioner.models.inference_decoder import InferenceDecoder, compute_active_rows

VOCABULARY = Vocabulary.from_captions(["a dog runs"])  # three words
WIDTH, REGIONS = 6, 5


def settings(kind: str, cell: str = "lstm", attributes: int = 0) -> DecoderConfig:
    sizes = {"embedding_size": 8, "hidden_size": 9, "attention_size": 7}
    return DecoderConfig(kind, cell, most_layers(kind), **sizes, attributes=attributes)


def make(kind: str, cell: str = "lstm", attributes: int = 0):
    """Return a random decoder that is far from uniform, in float64."""
    torch.manual_seed(4)
    decoder = make_decoder(settings(kind, cell, attributes), len(VOCABULARY), WIDTH)
    decoder = decoder.double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2.0)
        decoder.embedding.weight.mul_(8)
    return decoder


@pytest.mark.parametrize("attributes", [0, 3])
@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_a_wide_beam_finds_every_caption_with_its_probability(kind, cell, attributes):
    """Against teacher forcing over all captions there are of at most 3 words."""
    decoder = make(kind, cell, attributes)
    features = torch.randn(2, REGIONS, WIDTH, dtype=torch.float64)
    captions = [
        list(caption)
        for length in range(4)
        for caption in itertools.product(range(4, len(VOCABULARY)), repeat=length)
    ]
    config = SearchConfig(len(captions), 3, length_penalty=0.0, n_best=len(captions))
    steps = InferenceDecoder(decoder, torch.float64)
    for image, found in enumerate(generate([steps], [features], config, VOCABULARY)):
        expected = {}
        for caption in captions:
            token_ids = torch.tensor([[[BOS, *caption, EOS]]])
            output = decoder.teacher_forcing(features[image : image + 1], token_ids)
            expected[tuple(caption)] = float(output.log_probabilities().detach().sum())
        scores = [hypothesis.log_probability for hypothesis in found]
        assert {tuple(h.token_ids) for h in found} == expected.keys()
        assert scores == pytest.approx([expected[tuple(h.token_ids)] for h in found], abs=1e-9)
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_have_ended_take_nothing_from_the_others(kind, monkeypatch):
    """Search leaves them out of what each hypothesis computes for itself."""
    decoder = InferenceDecoder(make(kind), torch.float64)
    features = torch.randn(2, REGIONS, WIDTH, dtype=torch.float64)
    state, memory = decoder.init_state(features)
    state = tuple(part.expand(-1, 8, *part.shape[2:]) for part in state)
    _, state = decoder.step(torch.full((2, 8), BOS), state, memory)
    token_ids = torch.tensor([[4, 5, 0, 0, 6, 0, 0, 0], [0, 0, 0, 4, 0, 0, 0, 0]])
    going_on = token_ids != 0
    whole, new_state = decoder.step(token_ids.clamp(min=4), state, memory)
    rows = []

    def counted(function, token_ids, *inputs):
        def watched(*parts):
            rows.append(len(parts[0]))
            return function(*parts)

        return compute_active_rows(watched, token_ids, *inputs)

    monkeypatch.setattr(decoder._decoder, "active_rows", counted)
    logits, active_state = decoder.step(token_ids, state, memory)
    assert set(rows) == {int(going_on.sum())}
    assert len(rows) == (3 if kind == "up_down" else 2)
    torch.testing.assert_close(logits[going_on], whole[going_on], rtol=0, atol=1e-12)
    for one, other in zip(active_state, new_state, strict=True):
        torch.testing.assert_close(one[going_on], other[going_on], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_word_alone_decides_is_looked_up(kind, monkeypatch):
    """No embedding and no product with a word vector is computed in search."""
    decoder = InferenceDecoder(make(kind), torch.float64)
    state, memory = decoder.init_state(torch.randn(1, REGIONS, WIDTH, dtype=torch.float64))
    monkeypatch.setattr(decoder._decoder.embedding, "forward", None)
    for name, layer in decoder._decoder.named_children():
        if name.startswith("word_"):
            monkeypatch.setattr(layer, "forward", None)
    logits, _ = decoder.step(torch.tensor([[BOS]]), state, memory)
    assert logits.shape == (1, 1, len(VOCABULARY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attributes", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_steps_are_near_exact_ones(kind, attributes, dtype):
    if dtype == torch.bfloat16 and not computes_bfloat16(torch.device("cpu")):
        pytest.skip("needs a processor with instructions for bfloat16")
    exact = make(kind, attributes=attributes)
    features = torch.randn(2, REGIONS, WIDTH, dtype=torch.float64)
    found = []
    for precision in (torch.float64, dtype):
        decoder = InferenceDecoder(exact, precision)
        state, memory = decoder.init_state(features)
        for token in (BOS, 4, 5):
            logits, state = decoder.step(torch.full((2, 1), token), state, memory)
        found.append(logits.double().log_softmax(-1))
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("attributes", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_sum_to_1_and_a_checkpoint_brings_all_of_it_back(
    kind, attributes, tiny_model, tmp_path
):
    torch.manual_seed(0)
    config = settings(kind, attributes=attributes)
    model = CaptioningModel(tiny_model.encoder, config, VOCABULARY, SearchConfig(3, 4)).eval()
    save_checkpoint(model, tmp_path, {})
    pixels = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    outputs = []
    for each in (model, load_checkpoint(tmp_path)):
        captions = Captioner(each, "cpu", "float32").captions(pixels, each.search, attention=True)
        outputs.append([(best[0].text, best[0].log_probability) for best in captions])
        for best in captions:
            maps = best[0].attention
            assert (maps is not None) == (kind in ATTENDING_KINDS)
            if maps is not None:
                sums = torch.as_tensor(maps).flatten(1).sum(1)
                torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-4)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("attributes", [0, 3])
@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_search_on_another_device_than_the_cpu_takes_the_same_steps(kind, cell, attributes):
    """What only a CPU has, such as packed weights, must be asked of nothing else."""
    decoder = make(kind, cell, attributes)
    on_cpu, elsewhere = (
        InferenceDecoder(copy.deepcopy(decoder).to(device), torch.float64)
        for device in ("cpu", "meta")
    )
    shapes = []
    for search, device in ((on_cpu, "cpu"), (elsewhere, "meta")):
        state, memory = search.init_state(torch.zeros(2, REGIONS, WIDTH, device=device))
        logits, state = search.step(torch.full((2, 1), BOS, device=device), state, memory)
        assert logits.device.type == device
        shapes.append([tuple(part.shape) for part in (logits, *state)])
    assert shapes[0] == shapes[1]
