"""An exported captioner writes the captions of the checkpoint, whichever decoder it has."""

import copy
import dataclasses
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import learn_by_heart
from decoder_settings import KINDS_AND_CELLS, most_layers
from PIL import Image

from captioner import Captioner
from captioner.config import DecoderConfig, SearchConfig
from captioner.errors import CheckpointError, ConfigError, UsageError
from captioner.inference.onnx_export import export_captioner
from captioner.models.captioning_model import CaptioningModel
from captioner.runtime import OnnxCaptioner
from captioner.training.consensus import fit_consensus


def small_model(tiny_model, drawn, kind, cell, **settings) -> CaptioningModel:
    """Return a captioner that has learnt the drawn images, more or less."""
    torch.manual_seed(1)
    sizes = {"embedding_size": 16, "hidden_size": 24, "attention_size": 12, "dropout": 0.0}
    config = DecoderConfig(kind=kind, cell=cell, **{**sizes, **settings})
    search = SearchConfig(3, 8, 0.7)
    model = CaptioningModel(tiny_model.encoder, config, tiny_model.vocabulary, search)
    return learn_by_heart(model, drawn, 120)


# Every setting that changes a decoder's shape is with one of them.
OPTIONS = {
    ("show_and_tell", "lstm"): {"attributes": 5},
    ("show_and_tell", "gru"): {"tie_output": True},
    ("show_attend_tell", "lstm"): {"attention_heads": 4, "feature_size": 24},
    ("show_attend_tell", "gru"): {"feature_norm": True, "output_norm": True},
    ("up_down", "lstm"): {"attributes": 5, "feature_size": 20},
    ("up_down", "gru"): {"tie_output": True, "feature_norm": True},
    ("adaptive_attention", "lstm"): {"attributes": 5, "attention_heads": 2},
}


@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_captions_are_those_of_torch(kind, cell, tiny_model, drawn, tmp_path):
    """At beam 1 and 5, in batches of 1 and 7, with the attention and the log-probabilities."""
    options = {"layers": most_layers(kind), **OPTIONS.get((kind, cell), {})}
    model = small_model(tiny_model, drawn, kind, cell, **options)
    export_captioner(model, tmp_path / "exported")
    exported = OnnxCaptioner(tmp_path / "exported", threads=1)
    captioner = Captioner(model, "cpu", "float32")
    for beam, batch in ((1, 7), (5, 1), (5, 7)):
        settings = {"beam_size": beam, "n_best": beam, "attention": True, "batch_size": batch}
        expected = captioner.describe(drawn.paths[:7], **settings)
        found = exported.describe(drawn.paths[:7], **settings)
        assert len({round(of_image[0].log_probability, 3) for of_image in found}) > 1
        for ours, theirs in zip(found, expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one.score == pytest.approx(other.score, abs=1e-4)
                if one.text != other.text:  # two that score alike to within rounding
                    continue
                assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
                assert (one.attention is None) == (other.attention is None)
                if one.attention is not None:
                    np.testing.assert_allclose(one.attention, other.attention.numpy(), atol=1e-5)


def test_a_consensus_ranks_as_in_torch(tiny_model, drawn, tmp_path):
    model = copy.copy(tiny_model)
    captioner = Captioner(model, "cpu", "float32")
    pixels = torch.stack([captioner.preprocessing.load(path) for path in drawn.paths])
    features = captioner.features(pixels)[0].mean(1).numpy()
    captions = [[text.split()] for text in drawn.captions.values()]
    model.consensus = fit_consensus(features, captions, model.vocabulary, 50, 7)
    model.search = dataclasses.replace(model.search, consensus=20.0)
    captioner = Captioner(model, "cpu", "float32")
    plain = [[each.text for each in best] for best in captioner.describe(drawn.paths, n_best=3)]
    for precision in ("float32", "int8"):
        export_captioner(model, tmp_path / precision, precision)
        exported = OnnxCaptioner(tmp_path / precision, threads=1)
        found = exported.describe(drawn.paths, n_best=3)
        if precision == "float32":
            assert [[each.text for each in best] for best in found] == plain
        assert [best[0].text for best in found] == [best[0] for best in plain]
        expected = captioner.describe(drawn.paths, n_best=3)
        for ours, theirs in zip(found, expected, strict=True):
            tolerance = 1e-3 if precision == "float32" else 1.0
            assert ours[0].score == pytest.approx(theirs[0].score, abs=tolerance)
        without = exported.describe(drawn.paths, n_best=3, consensus=0.0)
        assert [each.text for best in without for each in best] != [
            each.text for best in found for each in best
        ]
    path = tmp_path / "int8/ngrams.json"
    (tmp_path / "int8/SHA256SUMS").write_text("")
    whole = json.loads(path.read_text())
    for damaged in (
        {},
        [],
        whole | {"token_ids": whole["token_ids"][:-1], "rarity": whole["rarity"][:-1]},
        whole | {"token_ids": [[2**40]] * len(whole["rarity"])},
        whole | {"token_ids": [[1, 2, 3, 4, 5]] * len(whole["rarity"])},
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match=r"ngrams.json: not what captioner export"):
            OnnxCaptioner(tmp_path / "int8")


def test_folders_of_the_first_format_are_read(exported, drawn, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(exported, folder)
    content = json.loads((folder / "export.json").read_text())
    content["format"] = 1
    del content["search"]["consensus"]
    (folder / "export.json").write_text(json.dumps(content))
    (folder / "SHA256SUMS").write_text("")
    captioner = OnnxCaptioner(folder)
    assert captioner.caption(drawn.paths) == list(drawn.captions.values())
    with pytest.raises(ConfigError, match=r"search.consensus: this captioner has none"):
        captioner.caption(drawn.paths[0], consensus=1.0)


@pytest.fixture(scope="session")
def exported(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "exported"
    export_captioner(tiny_model, folder)
    return folder


def test_smaller_weights_are_smaller_and_nearly_the_same(tiny_model, drawn, exported, tmp_path):
    expected = OnnxCaptioner(exported).describe(drawn.paths)
    sizes = [sum(path.stat().st_size for path in exported.iterdir())]
    for precision, tolerance in (("float16", 0.05), ("int8", 0.3)):
        folder = tmp_path / precision
        export_captioner(tiny_model, folder, precision)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
        captioner = OnnxCaptioner(folder)
        assert captioner.config.precision == precision
        found = captioner.describe(drawn.paths)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[0].text == theirs[0].text
            assert ours[0].log_probability == pytest.approx(
                theirs[0].log_probability, abs=tolerance
            )
            assert ours[0].log_probability != theirs[0].log_probability
    assert sizes[0] > 1.7 * sizes[1] > 1.7 * sizes[2]


def test_the_model_is_left_as_it_was(tiny_model, drawn, exported):
    captioner = Captioner(tiny_model, "cpu", "float32")
    assert captioner.caption(drawn.paths) == list(drawn.captions.values())
    assert OnnxCaptioner(exported).caption(drawn.paths) == list(drawn.captions.values())


def test_images_in_every_form(drawn, exported):
    captioner = OnnxCaptioner(exported)
    path = drawn.paths[0]
    expected = captioner.caption(path)
    image = Image.open(path)
    array = np.asarray(image.convert("RGB"))
    for form in (str(path), path.read_bytes(), image, array):
        assert captioner.caption(form) == expected
    with path.open("rb") as file:
        assert captioner.caption(file) == expected
    assert captioner.caption(np.stack([array, array])) == [expected] * 2
    assert captioner.caption([]) == []


def edited(folder, tmp_path, **changes):
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "export.json").read_text()) | changes
    (copy / "export.json").write_text(json.dumps(content))
    lines = (copy / "SHA256SUMS").read_text().splitlines()
    (copy / "SHA256SUMS").write_text("".join(f"{x}\n" for x in lines if "export.json" not in x))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "format 2 or earlier was expected, found 3"),
        ({"search": {"beam_size": 0}}, "beam_size"),
        ({"search": {"beams": 1}}, "not what captioner export wrote"),
        ({"regions": None, "more": 1}, "not what captioner export wrote"),
    ],
)
def test_another_folder_is_refused_in_a_line(exported, tmp_path, changes, message):
    with pytest.raises((CheckpointError, Exception), match=message) as error:
        OnnxCaptioner(edited(exported, tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_damaged_graphs_are_refused(exported, tmp_path):
    copy = edited(exported, tmp_path)
    content = (copy / "step.onnx").read_bytes()
    (copy / "step.onnx").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"step\.onnx: not what was saved"):
        OnnxCaptioner(copy)
    (copy / "SHA256SUMS").write_text("")
    with pytest.raises(CheckpointError, match=r"step\.onnx: onnxruntime can't read it"):
        OnnxCaptioner(copy)
    (copy / "step.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"step\.onnx: No such file"):
        OnnxCaptioner(copy)
    with pytest.raises(CheckpointError, match="no exported captioner is there"):
        OnnxCaptioner(tmp_path)


def test_what_only_torch_can_is_said(drawn, exported):
    captioner = OnnxCaptioner(exported)
    for settings in ({"forced": ("red",)}, {"samples": 3}, {"beam_size": 4, "groups": 2}):
        with pytest.raises(Exception, match="needs torch"):
            captioner.caption(drawn.paths[0], **settings)
    with pytest.raises(Exception, match="no search setting 'beams'"):
        captioner.caption(drawn.paths[0], beams=3)


def test_nan_gives_no_caption(overflowing_model, drawn, tmp_path):
    """An image that overflows is named; the others have their captions."""
    export_captioner(overflowing_model, tmp_path / "exported")
    captioner = OnnxCaptioner(tmp_path / "exported")
    black = Image.new("RGB", (64, 64))
    pixels = np.stack([captioner.pixels(image) for image in (drawn.paths[0], black)])
    first, second = captioner.captions(pixels, captioner.search())
    assert first[0].text == next(iter(drawn.captions.values()))
    assert second == []
    with pytest.raises(Exception, match="the image: the model gives NaN"):
        captioner.caption(black)


def test_export_needs_its_packages(tiny_model, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name)
    )
    with pytest.raises(UsageError, match=r"pip install 'captioner\[onnx\]'"):
        export_captioner(tiny_model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
