"""Reading every kind of image file, and turning it into the CNN's pixels."""

import contextlib
import io
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data._utils.pin_memory import pin_memory

from captioner.data.image_files import load_image, to_rgb
from captioner.data.images import PixelBatch, in_batches, load_pixels
from captioner.data.preprocessing import Preprocessing
from captioner.errors import ImageError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
COCO_IMAGES = SHARED / "coco_mini" / "val2017"

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(width=64, height=32):
    """An image whose quarters are red, green, blue and white, from the upper left by rows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = WHITE
    return Image.fromarray(pixels)


def colours(image):
    """Return the colours of an image's quarters as black-or-full RGB."""
    assert image.mode == "RGB"
    width, height = image.size
    points = [(x, y) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    return [tuple(255 * (v > 127) for v in image.getpixel(point)) for point in points]


def mode_of(path):
    with Image.open(path) as image:
        return image.mode


def close(image, colour, tolerance=3):
    pixels = np.asarray(load_image(image) if isinstance(image, Path) else image).astype(int)
    return np.abs(pixels - np.array(colour)).max() <= tolerance


# --- rotation -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_rotation_comes_out_upright(tmp_path, orientation, suffix):
    # What a camera does: it stores the pixels turned, and the tag says how to turn them back.
    upright = corners()
    stored = {
        1: upright,
        2: ImageOps.mirror(upright),
        3: upright.rotate(180),
        4: ImageOps.flip(upright),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(-90, expand=True),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif)
    image = load_image(path)
    assert image.size == (64, 32)
    assert colours(image) == [RED, GREEN, BLUE, WHITE]
    assert colours(to_rgb(image)) == [RED, GREEN, BLUE, WHITE]  # not turned again


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_a_rotation_that_does_not_exist_is_none(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners().save(tmp_path / "a.jpg", exif=exif)
    assert colours(load_image(tmp_path / "a.jpg")) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.filterwarnings("ignore:::PIL")  # it says what is damaged, and may
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0nonsense",
        b"Exif\0\0MM\0",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x02\0\0\0\x01" + b"\xff" * 4,
    ],
)
def test_damaged_exif_does_not_cost_the_picture(tmp_path, suffix, exif):
    path = tmp_path / f"a.{suffix}"
    corners().save(path, exif=exif)
    assert colours(load_image(path)) == [RED, GREEN, BLUE, WHITE]


def test_the_image_given_is_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    corners().save(file, "JPEG", exif=exif)
    image = Image.open(file)
    assert to_rgb(image).size == (32, 64)
    assert image.size == (64, 32)
    assert image.getexif()[0x0112] == 6


# --- modes ----------------------------------------------------------------------------------


def test_cmyk_jpeg(tmp_path):
    corners().convert("CMYK").save(tmp_path / "a.jpg")
    assert mode_of(tmp_path / "a.jpg") == "CMYK"
    assert colours(load_image(tmp_path / "a.jpg")) == [RED, GREEN, BLUE, WHITE]


def test_16_bit_grey_keeps_its_brightness(tmp_path):
    values = np.array([[0, 257 * 100, 257 * 200, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(load_image(tmp_path / name))[0, :, 1].tolist() == [0, 100, 200, 255]


def test_float_tiff_is_stretched_and_one_value_is_no_division_by_zero(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32)).save(tmp_path / "a.tif")
    assert np.asarray(load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.full((2, 2), 7.0, np.float32)).save(tmp_path / "b.tif")
    assert close(tmp_path / "b.tif", (0, 0, 0))


def test_palette(tmp_path):
    corners().convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    assert mode_of(tmp_path / "a.png") == "P"
    assert colours(load_image(tmp_path / "a.png")) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("transparency", [2, bytes([255, 255, 0, 255])])
def test_transparent_palette_entries_become_white(tmp_path, transparency):
    image = Image.new("P", (64, 32))
    image.putpalette([*RED, *GREEN, *BLUE, 0, 0, 0])
    for number, box in enumerate([(0, 0), (32, 0), (0, 16), (32, 16)]):
        image.paste(number, (*box, box[0] + 32, box[1] + 16))
    image.save(tmp_path / "a.png", transparency=transparency)
    assert colours(load_image(tmp_path / "a.png")) == [RED, GREEN, WHITE, (0, 0, 0)]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        ("LA", (0, 255), (0, 0, 0)),
        ("LA", (0, 0), WHITE),
        ("1", 0, (0, 0, 0)),
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
    ],
)
def test_other_modes(tmp_path, mode, colour, expected):
    Image.new(mode, (20, 10), colour).save(tmp_path / "a.png")
    assert mode_of(tmp_path / "a.png") == mode
    assert load_image(tmp_path / "a.png").mode == "RGB"
    assert close(tmp_path / "a.png", expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_becomes_white(tmp_path, mode):
    black, grey = (0, 90) if mode == "L" else ((0, 0, 0), (90, 90, 90))
    image = Image.new(mode, (64, 32), black)
    image.paste(grey, (32, 0, 64, 32))
    image.save(tmp_path / "a.png", transparency=black)
    pixels = np.asarray(load_image(tmp_path / "a.png"))
    assert (pixels[:, :32] == 255).all()
    assert (pixels[:, 32:] == 90).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 10), colour) for colour in (GREEN, RED, BLUE)]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=10, **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert close(path, GREEN)


# --- files that aren't images ---------------------------------------------------------------


def jpeg_bytes():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jpg", b""),
        ("text.jpg", b"image,caption\na.jpg,a dog\n"),
        ("half.jpg", jpeg_bytes()[: len(jpeg_bytes()) // 2]),
        ("head.jpg", jpeg_bytes()[:20]),
        ("html.png", b"<!DOCTYPE html><html>404</html>"),
        ("png.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 50),
    ],
)
def test_unreadable_files_are_named_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"{path}: not a readable image (")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="not a readable image"):
        load_image(tmp_path)


def test_random_damage_never_raises_anything_else(tmp_path):
    random = np.random.default_rng(0)
    path, read = tmp_path / "a", 0
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        file = io.BytesIO()
        corners().save(file, kind)
        for _ in range(40):
            content = bytearray(file.getvalue())
            for _ in range(int(random.integers(1, 10))):
                content[random.integers(len(content))] = random.integers(256)
            path.write_bytes(content)
            with contextlib.suppress(ImageError):
                assert load_image(path).mode == "RGB"
                read += 1
    assert 20 < read < 220  # of both kinds enough to mean something


@pytest.mark.parametrize("name", ["猫 🐈.jpg", "é\u0301.jpg", "a b'\"%.jpg", "x.JPG", "no_suffix"])
def test_file_names(tmp_path, name):
    corners().save(tmp_path / name, "JPEG")
    assert colours(load_image(tmp_path / name)) == [RED, GREEN, BLUE, WHITE]
    assert colours(load_image(str(tmp_path / name))) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX, whose file names are bytes")
def test_a_file_name_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    corners().save(path, "JPEG")
    assert colours(load_image(path)) == [RED, GREEN, BLUE, WHITE]


# --- preprocessing --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs():
    if not COCO_IMAGES.is_dir():
        pytest.skip("needs ../shared/data/coco_mini")
    return [load_image(path) for path in sorted(COCO_IMAGES.glob("*.jpg"))[:6]]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet50", "IMAGENET1K_V1"),
        ("resnet50", "IMAGENET1K_V2"),
        ("mobilenet_v3_large", "IMAGENET1K_V2"),
        ("efficientnet_b0", "IMAGENET1K_V1"),
        ("efficientnet_b3", "IMAGENET1K_V1"),
        ("convnext_tiny", "IMAGENET1K_V1"),
        ("regnet_y_16gf", "IMAGENET1K_SWAG_E2E_V1"),
        ("inception_v3", "IMAGENET1K_V1"),
    ],
)
def test_pixels_are_those_of_torchvisions_own_transforms(photographs, name, weights):
    own = torchvision.models.get_model_weights(name)[weights].transforms()
    preprocessing = Preprocessing(
        "crop", own.crop_size[0], own.resize_size[0], own.interpolation.value
    )
    own.mean, own.std = (0.0,) * 3, (1.0,) * 3  # normalised in the encoder: see test_encoder
    for image in photographs:
        expected = (own(image) * 255).round().to(torch.uint8)
        assert torch.equal(preprocessing(image), expected)


@pytest.mark.parametrize("size", [(640, 100), (100, 640), (300, 300), (7, 5), (1, 1)])
def test_squash_keeps_everything_in_view_and_crop_does_not(size):
    image = corners(*size)
    squashed = Preprocessing("squash", 64)(image)
    assert squashed.shape == (3, 64, 64)
    assert squashed.dtype == torch.uint8
    # A stripe at the very edge of the long side is seen after squashing alone.
    if max(size) > 2 * min(size):
        edge = image.copy()
        edge.paste((0, 0, 0), (0, 0, size[0] // 10, size[1] // 10))
        for resize, differs in (("squash", True), ("crop", False)):
            made = Preprocessing(resize, 64, 64)
            assert torch.equal(made(edge), made(image)) is not differs


def test_squashed_quarters_stay_where_they_are():
    pixels = Preprocessing("squash", 64)(corners(500, 60))
    points = [pixels[:, y, x].tolist() for y in (16, 48) for x in (16, 48)]
    assert [tuple(p) for p in points] == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [(10, 60_000), (60_000, 10), (1, 60_000)])
def test_a_huge_strip_is_quick(tmp_path, size, resize):
    path = tmp_path / "strip.png"
    Image.new("RGB", size, RED).save(path)
    started = time.process_time()
    pixels = Preprocessing(resize)(load_image(path))
    assert time.process_time() - started < 1
    assert pixels.shape == (3, 224, 224)
    assert (pixels[0] == 255).all()
    assert (pixels[1:] == 0).all()


def test_cutting_a_strip_does_not_change_its_centre():
    random = np.random.default_rng(0)
    strip = Image.fromarray(random.integers(0, 255, (40, 1600, 3), dtype=np.uint8))
    preprocessing = Preprocessing("crop", 64, 64)
    whole = torchvision.transforms.functional.resize(strip, [64])
    whole = torchvision.transforms.functional.center_crop(whole, [64, 64])
    expected = torchvision.transforms.functional.pil_to_tensor(whole)
    assert (preprocessing(strip).int() - expected.int()).abs().max() <= 1


# --- batches --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Nine files, the fourth and the last of which aren't images; image i is of grey 20 * i."""
    paths = [tmp_path / f"{i}.png" for i in range(9)]
    for i, path in enumerate(paths):
        Image.new("L", (10 + i, 20), 20 * i).save(path)
    paths[3].write_bytes(b"")
    paths[8].unlink()
    return paths


@pytest.mark.parametrize(("device", "workers"), [("cpu", 0), ("cpu", 2), ("meta", 2)])
def test_pixels_come_in_order_with_the_failures(folder, device, workers):
    """By this thread, by threads, and by worker processes, as for any device but a CPU."""
    batches = [[8, 0, 3], [7, 1], [3], [2, 4, 5, 6]]
    preprocessing = Preprocessing("squash", 16)
    found = list(load_pixels(folder, preprocessing, batches, torch.device(device), workers))
    assert [batch.indices for batch in found] == [[0], [7, 1], [], [2, 4, 5, 6]]
    assert [[i for i, _ in batch.failures] for batch in found] == [[8, 3], [], [3], []]
    assert found[0].failures[0][1] == f"{folder[8]}: no such file"
    assert found[0].failures[1][1].startswith(f"{folder[3]}: not a readable image")
    for batch in found:
        assert len(batch.pixels) == len(batch.indices)
        for index, pixels in zip(batch.indices, batch.pixels, strict=True):
            assert pixels.shape == (3, 16, 16)
            assert pixels.dtype == torch.uint8
            assert (pixels == 20 * index).all()


def test_a_large_jpeg_is_scaled_while_it_is_decoded(tmp_path):
    """Within two levels of grey of the whole decoded; small ones and other formats as before."""
    x, y = np.meshgrid(np.arange(2000), np.arange(1600))
    waves = np.stack([np.sin(x / 60), np.cos(y / 45), np.sin((x + y) / 80)], -1)
    image = Image.fromarray((127 + 120 * waves).astype(np.uint8))
    for resize in ("squash", "crop"):
        preprocessing = Preprocessing(resize, 64, 80)
        image.save(tmp_path / "large.jpg", quality=95)
        assert load_image(tmp_path / "large.jpg", 160).size == (250, 200)
        large = preprocessing.load(tmp_path / "large.jpg")
        whole = preprocessing(load_image(tmp_path / "large.jpg"))
        assert (large.int() - whole.int()).abs().max() <= 2
        image.resize((300, 159)).save(tmp_path / "small.jpg")
        small = preprocessing.load(tmp_path / "small.jpg")
        assert torch.equal(small, preprocessing(load_image(tmp_path / "small.jpg")))
        image.save(tmp_path / "large.png")
        assert torch.equal(preprocessing.load(tmp_path / "large.png"), preprocessing(image))


def test_batches_are_pinned_by_their_own_method():
    """What a ``DataLoader`` does with a batch, where a GPU is there for it."""
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    batch = PixelBatch([4, 5], pixels, [(6, "a.jpg: no such file")])
    if torch.accelerator.is_available():
        pinned = pin_memory(batch)
        assert isinstance(pinned, PixelBatch)
        assert pinned.pixels.is_pinned()
        assert (pinned.indices, pinned.failures) == (batch.indices, batch.failures)
        assert torch.equal(pinned.pixels, pixels)
        return
    with pytest.raises(RuntimeError) as expected:
        pixels.pin_memory()
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):  # so it was asked for
        pin_memory(batch)
    assert pin_memory(batch.failures) == batch.failures


def test_loading_leaves_the_random_numbers_alone(folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(load_pixels(folder, Preprocessing("squash", 16), [[0], [1]], torch.device("cpu"), 0))
    assert torch.equal(torch.rand(3), expected)


def test_in_batches():
    assert [list(b) for b in in_batches(5, 2)] == [[0, 1], [2, 3], [4]]
    assert in_batches(0, 2) == []
    assert [list(b) for b in in_batches(2, 5)] == [[0, 1]]
