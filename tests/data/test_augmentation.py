"""Random changes of training images: what is drawn, when, and what it does to the pixels."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.config import AugmentationConfig
from captioner.data.augmentation import (
    LEAST_ASPECT,
    MOST_ASPECT,
    Augmentation,
    of_epoch,
    of_view,
    tells_sides,
    views_of_epoch,
)
from captioner.data.images import load_pixels
from captioner.data.preprocessing import Preprocessing
from captioner.errors import ConfigError

ALL = AugmentationConfig(crop=0.4, flip=True, colour=0.3)
CPU = torch.device("cpu")


def photograph(width=90, height=60, seed=0):
    """Return smooth coloured noise, of which no two parts are alike."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / f"{i}.png" for i in range(12)]
    for i, path in enumerate(found):
        photograph(80 + 4 * i, 60, i).save(path)
    return found


def epoch_of(seed, epoch, settings=ALL, count=12):
    return partial(of_epoch, settings, [True] * count, seed, epoch)


def load(paths, batches, augment, device="cpu", workers=0):
    """Return the pixels of each image, by its index."""
    preprocessing = Preprocessing("crop", 32, 40)
    loaded = load_pixels(paths, preprocessing, batches, torch.device(device), workers, augment)
    return {
        index: pixels
        for batch in loaded
        for index, pixels in zip(batch.indices, batch.pixels, strict=True)
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[index], expected[index]) for index in found)


# --- what decides -------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "workers"), [("cpu", 2), ("meta", 2)])
def test_order_batches_threads_and_processes_change_nothing(paths, device, workers):
    """Processes read for any device but a CPU."""
    expected = load(paths, [range(12)], epoch_of(5, 3))
    plain = load(paths, [range(12)], None)
    assert not any(torch.equal(plain[i], expected[i]) for i in range(12))
    batches = [[11, 2, 7], [0], [1, 3, 4, 5, 6], [10, 9, 8]]
    assert_equal(load(paths, batches, epoch_of(5, 3), device, workers), expected)
    # The rest of an epoch, as after resuming.
    rest = load(paths, batches[2:], epoch_of(5, 3), device, workers)
    assert_equal(rest, {i: expected[i] for i in (1, 3, 4, 5, 6, 10, 9, 8)})


def test_every_seed_epoch_and_image_draws_something_else():
    drawn = {
        tuple(epoch_of(seed, epoch)(image)._drawn)
        for seed, epoch, image in itertools.product(range(3), range(3), range(12))
    }
    views = {
        tuple(of_view(AugmentationConfig(seed=seed), [True], {0: content}, view, 0)._drawn)
        for seed, view, content in itertools.product(range(3), range(1, 3), ("0", "1", "f" * 32))
    }
    assert len(drawn | views) == 3 * 3 * 12 + 3 * 2 * 3
    assert {len(numbers) for numbers in drawn | views} == {26}


def test_torchs_and_numpys_own_random_numbers_stay_as_they_are(paths):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(0)
    np.random.seed(0)
    load(paths, [range(12)], epoch_of(0, 0))
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(2) == expected[1]).all()


def test_each_image_shows_all_its_views_in_turn():
    epochs = np.stack([views_of_epoch(7, epoch, 1000, 4) for epoch in range(8)])
    assert (np.sort(epochs[:4], axis=0) == np.arange(4)[:, None]).all()
    assert (epochs[4:] == epochs[:4]).all()
    assert (np.bincount(epochs[0]) > 200).all()  # about as many images in each view
    assert (views_of_epoch(8, 0, 1000, 4) != epochs[0]).any()
    assert (views_of_epoch(7, 5, 1000, 1) == 0).all()


# --- crop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(640, 480), (375, 500), (224, 224)])
@pytest.mark.parametrize("aspect", [1, None])
def test_crops_keep_area_and_aspect_within_their_bounds(size, aspect):
    width, height = size
    aspect = aspect or width / height
    areas, shapes, places = [], [], []
    for image in range(400):
        left, top, right, bottom = epoch_of(0, 0, count=400)(image).crop_box(*size, aspect)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        shapes.append((right - left) / (bottom - top) / aspect)
        places.append((left + right) / 2 / width)
    assert 0.4 - 1e-9 <= min(areas) < 0.42
    assert 0.8 < max(areas) <= 1
    assert LEAST_ASPECT - 1e-9 <= min(shapes) < 0.8
    assert 1.25 < max(shapes) <= MOST_ASPECT + 1e-9
    assert min(places) < 0.4
    assert max(places) > 0.6


@pytest.mark.parametrize("size", [(1000, 100), (100, 1000)])
def test_a_strip_gives_its_largest_part_of_an_allowed_aspect(size):
    boxes = {epoch_of(0, 0)(image).crop_box(*size) for image in range(12)}
    assert len(boxes) == 12  # at different places
    for left, top, right, bottom in boxes:
        sides = sorted([right - left, bottom - top])
        assert sides == pytest.approx([100, 400 / 3])


def test_a_crop_is_that_part_of_the_image_scaled_to_the_square():
    """Against cutting whole pixels first; only the filter's reach over the edge differs."""
    image = photograph(300, 200)
    augmentation = epoch_of(1, 1, AugmentationConfig(crop=0.3))(0)
    box = augmentation.crop_box(300, 200)
    cut = image.crop(tuple(round(side) for side in box))
    expected = np.asarray(cut.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    found = Preprocessing("crop", 32, 40)(image, augmentation).permute(1, 2, 0).numpy()
    assert abs(found - expected).mean() < 2
    whole = Preprocessing("crop", 32, 40)(image).permute(1, 2, 0).numpy().astype(int)
    assert abs(found - whole).mean() > 10


def test_a_part_of_a_large_jpeg_is_as_sharp_as_the_whole(tmp_path):
    """What is scaled down while it is decoded still has twice the pixels that the crop needs."""
    photograph(3000, 2000).save(tmp_path / "large.jpg", quality=95)
    augmentation = epoch_of(1, 1, AugmentationConfig(crop=0.1))(0)
    preprocessing = Preprocessing("crop", 32, 40)
    found = preprocessing.load(tmp_path / "large.jpg", augmentation=augmentation)
    expected = preprocessing(photograph(3000, 2000), augmentation)
    assert (found.int() - expected.int()).abs().max() <= 4


# --- flip and colour ----------------------------------------------------------------------------


def test_half_of_the_images_are_flipped_and_none_that_may_not_be():
    image, preprocessing = photograph(), Preprocessing("squash", 32)
    plain = preprocessing(image)
    settings = AugmentationConfig(flip=True)
    flipped = 0
    for number in range(100):
        found = preprocessing(image, epoch_of(0, 0, settings, 100)(number))
        assert torch.equal(found, plain) or torch.equal(found, plain.flip(2))
        flipped += torch.equal(found, plain.flip(2))
        held = of_epoch(settings, [False] * 100, 0, 0, number)
        assert torch.equal(preprocessing(image, held), plain)
    assert 30 < flipped < 70


def test_colours_change_by_the_factors_drawn():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    preprocessing = Preprocessing("squash", 8)
    settings = AugmentationConfig(colour=0.2)
    levels = [
        int(preprocessing(grey, epoch_of(0, 0, settings, 200)(i))[0, 0, 0]) for i in range(200)
    ]
    assert 80 <= min(levels) < 84  # of one grey only the brightness changes
    assert 116 < max(levels) <= 120
    red = Image.new("RGB", (8, 8), (200, 50, 50))
    spread = [
        np.ptp(preprocessing(red, epoch_of(0, 0, settings, 200)(i))[:, 0, 0].numpy().astype(int))
        for i in range(200)
    ]
    assert min(spread) < 115
    assert max(spread) > 185  # 150 as it is


def test_settings_that_are_off_change_nothing():
    image, preprocessing = photograph(), Preprocessing("crop", 32, 40)
    augmentation = Augmentation(AugmentationConfig(), True, (1, 2))
    assert torch.equal(preprocessing(image, augmentation), preprocessing(image))
    assert not AugmentationConfig().changes


# --- captions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption",
    [
        *("A dog on the left .", "a man in the leftmost seat", "Right-hand side", "TO THE RIGHT"),
        *("a cup right next to a plate", "its lefthand door", "he left", "the topright corner"),
        *("facing left-wards", "rightward", "a bright lamp to the right"),
    ],
)
def test_captions_that_say_left_or_right(caption):
    assert tells_sides(["a dog", caption])


def test_captions_that_say_neither():
    others = ["a bright light", "an upright bear", "the brightest sign", "a frightened cat"]
    assert not tells_sides([*others, "a playwright", "a cleft rock", "a dog lifts its leg", ""])


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 0}, r"augmentation\.crop: at least 0\.05 was expected, found 0"),
        ({"crop": 1.5}, r"augmentation\.crop: at most 1\.0 was expected, found 1\.5"),
        ({"colour": 1.0}, r"augmentation\.colour: at least 0 and below 1 was expected"),
        ({"views": 0}, r"augmentation\.views: at least 1 was expected, found 0"),
        ({"views": 4}, r"augmentation\.views \(4\) has no effect without augmentation\.crop, flip"),
        ({"seed": -1}, r"augmentation\.seed: at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AugmentationConfig(**settings)
