"""Captioner: whatever form images come in, the same captions come out."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.errors import CheckpointError, ConfigError, ImageError, SearchError
from captioner.inference.captioner import Captioner

CPU = torch.device("cpu")


def tensor(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_every_form_of_an_image_gives_the_same_caption(captioner, drawn):
    for name, caption in drawn.captions.items():
        path = drawn.images / name
        pixels = tensor(path)
        with Image.open(path) as image:
            forms = [
                path,
                str(path),
                image,  # not decoded yet
                Image.open(path).convert("RGBA"),
                Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE),
                pixels,
                pixels / 255,
                (pixels / 255).double(),
            ]
            assert [captioner.caption(form) for form in forms] == [caption] * len(forms)
            assert captioner.caption(forms) == [caption] * len(forms)


def test_arrays_bytes_and_open_files_are_images(captioner, drawn):
    for path in drawn.paths:
        image = Image.open(path)
        opaque = np.array(image.convert("RGBA"))
        with open(path, "rb") as file:
            forms = [
                *(np.array(image), opaque, np.asfortranarray(np.array(image))),
                *(path.read_bytes(), bytearray(path.read_bytes()), io.BytesIO(path.read_bytes())),
                file,
            ]
            assert [captioner.caption(form) for form in forms] == [drawn.captions[path.name]] * 7
            assert captioner.caption(forms) == [drawn.captions[path.name]] * 7
    grey = image.convert("L")
    expected = captioner.describe(grey)[0]
    assert captioner.describe(np.array(grey))[0] == expected
    assert captioner.describe(np.array(grey)[..., None])[0] == expected
    clear = opaque.copy()
    clear[..., 3] = 0  # transparency is white, as in a file
    assert captioner.describe(clear)[0] == captioner.describe(np.full_like(opaque, 255))[0]
    pair = np.stack([np.array(image)] * 2)
    assert captioner.caption(pair) == [drawn.captions[path.name]] * 2
    assert captioner.caption(np.array([str(path)])) == [drawn.captions[path.name]]


def test_float_and_uint8_tensors_are_the_same_pixels(captioner, drawn, monkeypatch):
    """All 256 values, in single precision, come back as they were."""
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    seen = []
    features = captioner.features
    monkeypatch.setattr(
        captioner, "features", lambda pixels: seen.append(pixels) or features(pixels)
    )
    captioner.caption([ramp, ramp / 255, ramp / np.float32(255)])
    assert torch.equal(seen[0][0], seen[0][1])
    assert torch.equal(seen[0][0], seen[0][2])


def test_one_gives_text_and_many_give_a_list(captioner, drawn):
    expected = list(drawn.captions.values())
    paths = drawn.paths
    assert captioner.caption(paths[0]) == expected[0]
    assert captioner.caption([paths[0]]) == expected[:1]
    assert captioner.caption(tuple(paths)) == expected
    assert captioner.caption(path for path in paths) == expected
    assert captioner.caption([]) == []
    assert captioner.caption(iter(())) == []
    square = [tensor(paths[0])] * 3
    assert captioner.caption(torch.stack(square)) == [expected[0]] * 3
    assert captioner.caption(torch.stack(square)[:1] / 255) == expected[:1]
    assert captioner.caption(torch.empty(0, 3, 8, 8)) == []
    one, several = captioner.describe(paths[0]), captioner.describe(paths)
    assert [caption.text for caption in one] == expected[:1]
    assert [[caption.text for caption in best] for best in several] == [[e] for e in expected]
    assert captioner.describe([paths[0]])[0][0].text == expected[0]


def test_scores_are_what_captions_are_ranked_by(captioner, drawn):
    for settings in (
        {"n_best": 3, "beam_size": 5},
        {"n_best": 3, "beam_size": 5, "length_penalty": 2.0},
        {"n_best": 4, "samples": 4, "temperature": 8.0, "top_k": 5},
    ):
        penalty = captioner.search(**settings).length_penalty
        for captions in captioner.describe(drawn.paths, **settings):
            scores = [caption.score for caption in captions]
            assert scores == sorted(scores, reverse=True)
            for caption in captions:
                length = len(caption.text.split()) + 1
                expected = caption.log_probability / length**penalty
                assert caption.score == pytest.approx(expected)


@pytest.mark.parametrize("settings", [{"n_best": 2}, {"samples": 3}, {"samples": 2, "n_best": 2}])
def test_several_captions_are_asked_of_describe(captioner, drawn, settings):
    with pytest.raises(ConfigError, match=r"caption gives one caption of an image; describe"):
        captioner.caption(drawn.paths[0], **settings)
    assert isinstance(captioner.caption(drawn.paths[0], n_best=1, samples=1, seed=3), str)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_batches_never_change_a_caption(captioner, drawn, beam_size):
    """Also of images that the model has never seen and is unsure about."""
    noise = random.Random(0)
    strangers = []
    for path in drawn.paths * 3:
        image = Image.open(path).rotate(noise.randrange(360), fillcolor="gray")
        strangers.append(image.resize((noise.randrange(20, 90), noise.randrange(20, 90))))
    images = [*drawn.paths, *strangers]
    one_by_one = [captioner.caption(image, beam_size=beam_size) for image in images]
    assert len(set(one_by_one[8:])) > 3
    for batch_size in (1, 3, 100):
        assert captioner.caption(images, beam_size=beam_size, batch_size=batch_size) == one_by_one


def test_a_generator_is_read_a_batch_at_a_time(captioner, drawn):
    read = []

    def images():
        for path in drawn.paths:
            read.append(path)
            yield path
        raise RuntimeError("the end")

    with pytest.raises(RuntimeError, match="the end"):
        captioner.caption(images(), batch_size=3)
    assert len(read) == 8


def test_settings_are_the_checkpoints_unless_given(captioner, drawn):
    assert captioner.search() == captioner.model.search
    changed = captioner.search(beam_size=7, max_length=9, length_penalty=0.0, groups=None)
    assert (changed.beam_size, changed.max_length, changed.length_penalty) == (7, 9, 0.0)
    assert captioner.caption(drawn.paths[0], max_length=2) == "a red"
    assert len(captioner.caption(drawn.paths[0]).split()) == 5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beam_size": 0}, "beam_size: at least 1"),
        ({"beam_size": -3}, "beam_size: at least 1"),
        ({"max_length": 0}, "max_length: at least 1"),
        ({"length_penalty": -0.1}, "length_penalty: at least 0"),
        ({"length_penalty": float("nan")}, "length_penalty: "),
        ({"batch_size": 0}, "batch_size: at least 1 was expected, found 0"),
        ({"batch_size": -1}, "batch_size: at least 1 was expected, found -1"),
    ],
)
def test_impossible_settings_are_refused(captioner, drawn, settings, expected):
    with pytest.raises(ConfigError, match=expected):
        captioner.caption(drawn.paths, **settings)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("none.jpg", r"none\.jpg: no such file"),
        (torch.randn(3, 8, 8), "uint8, or float from 0 to 1"),
        (torch.full((3, 8, 8), 255.0), "found torch.float32 from 255"),
        (torch.full((3, 8, 8), torch.nan), "found torch.float32 from nan"),
        (torch.full((3, 8, 8), 200), "found torch.int64"),
        (torch.zeros(8, 8, 3), r"\(3, H, W\) was expected, found \(8, 8, 3\)"),
        (torch.zeros(2, 4, 8, 8), r"\(3, H, W\) was expected, found \(4, 8, 8\)"),
        (torch.zeros(3, 0, 8), r"\(3, H, W\) was expected, found \(3, 0, 8\)"),
        (torch.zeros(8, 8), r"\(3, H, W\) was expected, found \(8, 8\)"),
        (np.zeros((3, 8, 9), np.uint8), r"array \(H, W, 3\), .* found \(3, 8, 9\)"),
        (np.zeros((8, 8, 3)), "pixels as uint8, found float64"),
        (np.zeros((0, 8, 3), np.uint8), r"found uint8 of shape \(0, 8, 3\)"),
        (b"GIF", r"not a readable image \(no known format\)"),
        (io.BytesIO(b"\xff\xd8\xff"), "not a readable image"),
        (io.StringIO("text"), "not a readable image"),
        (None, "expected, found NoneType"),
        (7, "expected, found int"),
    ],
)
def test_what_is_no_image_is_refused(captioner, drawn, image, expected):
    with pytest.raises(ImageError, match=expected):
        captioner.caption(image)
    with pytest.raises(ImageError, match=expected):
        captioner.caption([drawn.paths[0], *(image if getattr(image, "ndim", 3) == 4 else [image])])


def test_an_image_that_gives_nan_is_named(overflowing_model, tiny_model, drawn, tmp_path):
    black = tmp_path / "black.png"
    Image.new("RGB", (64, 64)).save(black)
    expected = list(drawn.captions.values())
    for models in (overflowing_model, [tiny_model, overflowing_model]):
        captioner = Captioner(models, "cpu", "float32")
        assert captioner.caption(drawn.paths) == expected
        for images, name in (
            (black, str(black)),
            (Image.new("RGB", (9, 9)), "the image"),
            ([*drawn.paths[:2], black, drawn.paths[2]], str(black)),
            ([*drawn.paths[:2], Image.new("RGB", (9, 9))], "images[2]"),
        ):
            with pytest.raises(SearchError, match="gives NaN instead of probabilities") as caught:
                captioner.caption(images)
            assert str(caught.value).startswith(f"{name}: ")
    captioner = Captioner(overflowing_model, "cpu", "float32")
    pixels = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    assert captioner.captions(pixels, captioner.search(), attention=True) == [[]]
    hypotheses = captioner.hypotheses(captioner.features(pixels), captioner.search())
    with pytest.raises(SearchError, match="1 of 1 images: the model gives NaN"):  # validation
        captioner.model.best_captions(hypotheses)


def test_captioning_leaves_the_model_as_it_was(tiny_model, captioner, drawn):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    captioner.caption(drawn.paths)
    assert all(torch.equal(before[name], now) for name, now in tiny_model.state_dict().items())
    assert not tiny_model.training


def test_from_pretrained(checkpoint, drawn, tmp_path):
    loaded = Captioner.from_pretrained(str(checkpoint), device="cpu")
    assert loaded.device == CPU
    assert loaded.caption(drawn.paths, beam_size=5) == list(drawn.captions.values())
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Captioner.from_pretrained(tmp_path / "none")
    with pytest.raises(ConfigError, match="device 'gpu' can't be used here"):
        Captioner.from_pretrained(checkpoint, device="gpu")


def test_bfloat16_gives_the_same_captions(tiny_model, drawn):
    captions = Captioner(tiny_model, "cpu", "bfloat16").caption(drawn.paths)
    assert captions == list(drawn.captions.values())


def test_the_package_offers_it_by_name():
    import captioner as package

    assert package.Captioner is Captioner
    with pytest.raises(AttributeError, match="no attribute 'Captoiner'"):
        package.Captoiner  # noqa: B018
