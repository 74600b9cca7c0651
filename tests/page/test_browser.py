"""The page computes in a real browser what Python computes: pixels and captions."""

import shutil

import numpy as np
import PIL
import pytest
from PIL import Image
from served_pages import open_page, served

from captioner.data.preprocessing import Preprocessing
from captioner.runtime import OnnxCaptioner

CAPTION = """async ([names, changes]) => {
  const { openCaptioner } = await import("./client.js");
  const client = await openCaptioner();
  const found = [];
  for (const name of names) {
    const image = await (await fetch("images/" + name)).blob();
    const { captions } = await client.caption(image, changes);
    const lists = (attention) => attention.map((map) => [...map]);
    found.push(captions.map((each) => ({ ...each, attention: lists(each.attention) })));
  }
  return found;
}"""


@pytest.mark.parametrize("kind", ["page", "constrained_page"])
def test_captions_are_those_of_python(context, site, drawn, kind):
    shutil.copytree(drawn.images, site / kind / "images", dirs_exist_ok=True)
    captioner = OnnxCaptioner(site / kind / "model", threads=1)
    with served(site / kind) as address:
        tab, problems = open_page(context, address)
        for beams in (1, 5):
            changes = {"beam_size": beams, "n_best": beams}
            found = tab.evaluate(CAPTION, [list(drawn.captions), changes])
            expected = captioner.describe(drawn.paths, attention=True, **changes)
            assert len({captions[0]["text"] for captions in found}) > 3
            for ours, theirs in zip(found, expected, strict=True):
                assert [each["text"] for each in ours] == [each.text for each in theirs]
                for one, other in zip(ours, theirs, strict=True):
                    assert one["logProbability"] == pytest.approx(other.log_probability, abs=1e-3)
                    assert one["score"] == pytest.approx(other.score, abs=1e-3)
                    maps = other.attention.reshape(len(other.attention), -1)
                    np.testing.assert_allclose(one["attention"], maps, atol=1e-4)
        assert not problems


# --- pixels -----------------------------------------------------------------------------------

PIXELS = """async ([name, preprocessing]) => {
  const { decode, readable, toPixels } = await import("./preprocessing.js");
  const bitmap = await decode(await (await fetch("images/" + name)).blob());
  return [...toPixels(readable(bitmap), preprocessing)];
}"""
SIZES = [(64, 48), (500, 375), (31, 200), (1200, 40), (2100, 1600)]


def photograph(width, height, bands=3):
    random = np.random.default_rng(width)
    small = random.integers(0, 256, (8, 8, bands), dtype=np.uint8)
    noise = random.integers(0, 40, (height, width, bands))
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((large + noise).clip(0, 255).astype(np.uint8))


def differences(tab, site, name, preprocessing):
    """Return the difference of each pixel between the browser and Python."""
    found = tab.evaluate(PIXELS, [name, preprocessing.to_dict()])
    expected = preprocessing.load_square(str(site / "page/images" / name))[0]
    expected = np.asarray(expected, dtype=int).transpose(2, 0, 1).ravel()
    return np.abs(np.array(found) - expected)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="needs Pillow 13")
def test_pixels_of_png_are_those_of_python(context, site):
    """To the byte: in each way of scaling, turned, with and without transparency."""
    images = site / "page/images"
    images.mkdir(exist_ok=True)
    for width, height in SIZES:
        photograph(width, height).save(images / f"{width}.png", compress_level=1)
    photograph(90, 70).convert("P", palette=Image.Palette.ADAPTIVE).save(images / "palette.png")
    photograph(90, 70).convert("L").save(images / "grey.png")
    glass = photograph(90, 70, 4)
    glass.save(images / "glass.png")
    glass.putalpha(glass.getchannel("A").point(lambda value: 255 * (value > 99)))
    glass.save(images / "holes.png")
    with served(site / "page") as address:
        tab, _ = open_page(context, address)
        for preprocessing in (
            Preprocessing("squash", 48, 48, "bilinear"),
            Preprocessing("squash", 64, 64, "bicubic"),
            Preprocessing("crop", 48, 56, "bilinear"),
            Preprocessing("crop", 57, 64, "bicubic"),
        ):
            names = [*(f"{width}.png" for width, _ in SIZES), "palette.png", "grey.png"]
            for name in [*names, "holes.png"]:
                assert not differences(tab, site, name, preprocessing).any(), (name, preprocessing)
            # Browsers multiply colours by opacity in 8 bits.
            assert differences(tab, site, "glass.png", preprocessing).max() <= 2


def test_jpegs_are_turned_as_their_exif_says(context, site):
    """Browsers decode JPEG by themselves: pixels differ a little."""
    images = site / "page/images"
    images.mkdir(exist_ok=True)
    preprocessing = Preprocessing("squash", 48, 48, "bilinear")
    with served(site / "page") as address:
        tab, _ = open_page(context, address)
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            name = f"turned_{orientation}.jpg"
            photograph(120, 90).save(images / name, quality=95, exif=exif)
            assert differences(tab, site, name, preprocessing).mean() < 1
