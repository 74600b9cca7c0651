"""HEIC, PNG with more in it than pixels, and what is said of files that are no images."""

import io
import struct
import sys
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from captioner.data.image_files import load_image
from captioner.data.image_formats import IMAGE_SUFFIXES, open_image
from captioner.errors import ImageError


def halves(width=160, height=96):
    """Red above, blue below."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (0, height // 2, width, height))
    return image


def heic(image, **options):
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


# --- HEIC -------------------------------------------------------------------------------------


def test_heic_is_read_whatever_its_name(tmp_path):
    assert {".heic", ".heif", ".hif"} <= IMAGE_SUFFIXES
    content = heic(halves())
    (tmp_path / "photo.jpg").write_bytes(content)
    with open(tmp_path / "photo.jpg", "rb") as file:
        for source in (tmp_path / "photo.jpg", content, file):
            image = load_image(source)
            assert (image.mode, image.size) == ("RGB", (160, 96))
            assert np.abs(np.asarray(image).astype(int) - np.asarray(halves())).mean() < 4
    assert "HEIF" not in Image.OPEN  # what other programs open stays as it is


@pytest.mark.parametrize("brand", [b"heix", b"mif1", b"msf1", b"MiHB"])
def test_heic_of_other_brands(brand):
    content = heic(halves()).replace(b"ftypheic", b"ftyp" + brand, 1)
    assert load_image(content).size == (160, 96)


def test_avif_and_films_are_no_heic():
    for brands in (b"avif\0\0\0\0mif1miaf", b"mif1\0\0\0\0avifmiaf", b"isom\0\0\x02\0isomiso2"):
        content = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(99)
        with pytest.raises(ImageError, match="damaged AVIF" if b"avif" in brands else "no known"):
            load_image(content)


def test_heic_is_turned_once():
    turned = halves().transpose(Image.Transpose.ROTATE_90)
    image = load_image(heic(turned, exif=exif(6)))
    assert image.size == image.info["original_size"] == (160, 96)
    assert image.getpixel((80, 10))[0] > 200
    assert image.getpixel((80, 86))[2] > 200
    opened = open_image(io.BytesIO(heic(turned, exif=exif(6))))
    assert load_image(opened).size == (160, 96)
    opened.load()
    assert load_image(opened).size == (160, 96)


def test_of_heic_the_image_is_taken_not_its_thumbnail():
    """It may show something else, and making it ready costs a decoding that isn't counted."""
    content = heic(halves(640, 384), thumbnails=[320])
    opened = open_image(io.BytesIO(content))
    assert opened.info["thumbnails"]
    assert load_image(content, 32).size == load_image(opened, 32).size == (640, 384)


def test_heic_is_measured_before_it_is_decoded(monkeypatch):
    content = heic(halves(1100, 1000))
    reserved = []
    load_image(content, reserve=reserved.append)
    assert reserved == [20 * 1_100_000]
    monkeypatch.setenv("CAPTIONER_MAX_MEGAPIXELS", "1")
    monkeypatch.setattr(pillow_heif.HeifImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"a.heic: 1\.1 megapixels are too many"):
        load_image(content, name="a.heic")


def test_without_the_extra_heic_is_a_line_that_tells_it(monkeypatch):
    content = heic(halves())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError) as caught:
        load_image(content, name="a.heic")
    assert str(caught.value) == (
        "a.heic: not a readable image (HEIC is read by an extra: pip install 'captioner[heic]')"
    )
    file = io.BytesIO()
    halves().save(file, "AVIF")  # needs no extra
    assert load_image(file.getvalue()).size == (160, 96)


def test_damaged_heic_fails_with_the_reason():
    content = heic(halves())
    for length in (12, 40, 200, len(content) - 40):
        with pytest.raises(ImageError, match=r"not a readable image \(.*\)$"):
            load_image(content[:length])


# --- PNG --------------------------------------------------------------------------------------


def with_chunk(content, name, data, at=33, crc=None):
    """Put a chunk into a PNG, by default after its header."""
    crc = zlib.crc32(name + data) if crc is None else crc
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)
    return content[:at] + chunk + content[at:]


BOMB = b"Comment\0\0" + zlib.compress(bytes(2_000_000))


@pytest.mark.parametrize("at", [33, -12])
@pytest.mark.parametrize(
    ("name", "data", "crc"), [(b"zTXt", BOMB, None), (b"tEXt", b"a\0b", 1), (b"cHRM", b"", None)]
)
def test_what_is_beside_the_pixels_of_a_png_does_not_matter(tmp_path, at, name, data, crc):
    file = io.BytesIO()
    image = halves().transpose(Image.Transpose.ROTATE_90)
    image.putalpha(255)
    image.save(file, "PNG", exif=exif(6))
    path = tmp_path / "a.png"
    path.write_bytes(with_chunk(file.getvalue(), name, data, at, crc))
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(halves()))
    assert load_image(path).info["original_size"] == (160, 96)


def test_damaged_pixels_of_a_png_do():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    content = with_chunk(file.getvalue(), b"zTXt", BOMB)
    for damaged in (content[:-200], content[:-900] + bytes(100) + content[-800:]):
        with pytest.raises(ImageError, match="not a readable image"):
            load_image(damaged)


# --- files that are no images -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"\xef\xbb\xbf\r\n<!doctype HTML>", "a web page, HTML"),
        (b"<?xml version='1.0'?>\n<!-- x -->\n<svg>", "a drawing without pixels, SVG"),
        (b"%PDF-1.4", "a document, PDF"),
        (b"PK\3\4", "an archive, ZIP"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer to a file in Git LFS; git lfs"),
        (b"\xff\xd8\xff\xe0", "not enough|Truncated|a damaged JPEG file"),
        (b"\x89PNG\r\n\x1a\n", "a damaged PNG file, or one of a rare kind"),
        (b"GIF89a", "a damaged GIF file"),
        (b"x", "no known format"),
        (b"Dear reader", "no known format"),
    ],
)
def test_files_that_are_no_images_are_told_apart(content, reason):
    with pytest.raises(ImageError, match=rf"a.png: not a readable image \(({reason})"):
        load_image(content, name="a.png")
