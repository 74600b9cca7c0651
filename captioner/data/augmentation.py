"""Random changes of training images: crop, flip, colour.

What an image gets depends on its key alone, such as (seed, epoch, image): not on the order in
which images are read, nor on the thread or process that reads them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageEnhance

from captioner.config import AugmentationConfig

# The width of a crop by its height, beside that of the image that isn't cropped.
LEAST_ASPECT, MOST_ASPECT = 3 / 4, 4 / 3
CROPS_TRIED = 10
_COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

Box = tuple[float, float, float, float]

# "left", "rightmost", "right-hand", "topleft"; all other words with these letters aren't meant.
SIDES = re.compile(r"\b(?!\w*(?:bright|upright|fright|wright|cleft))\w*(?:left|right)", re.I)


def tells_sides(captions: Sequence[str]) -> bool:
    """Return whether a caption (English) says left or right, so that it isn't true when flipped.

    "He left" and "right next to" count too: an image less to be flipped does no harm.
    """
    return any(map(SIDES.search, captions))


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for one image.

    Args:
        settings: What may be changed, and how much.
        flippable: Whether the image may be flipped, if ``settings`` say so.
        key: Numbers of at least 0 that alone decide what is drawn.
    """

    settings: AugmentationConfig
    flippable: bool
    key: tuple[int, ...]

    @cached_property
    def _drawn(self) -> np.ndarray:
        """All numbers that any settings may need, so that none depends on another setting."""
        return np.random.default_rng(self.key).random(2 * CROPS_TRIED + 6)

    @property
    def crops(self) -> bool:
        """Whether it cuts a part out of the image."""
        return self.settings.crop < 1

    @property
    def least_side(self) -> float:
        """The least share of an image's side that a crop has, about."""
        return math.sqrt(self.settings.crop * LEAST_ASPECT)

    def crop_box(self, width: int, height: int, aspect: float = 1.0) -> Box:
        """Return the part of an image that is kept: left, top, right, bottom, in pixels.

        Its area is drawn from ``settings.crop`` of the image to the whole, its aspect evenly on a
        logarithmic scale. An image so long and narrow that no such part of it is found gives the
        largest one of an allowed aspect.

        Args:
            width: Of the image.
            height: Of the image.
            aspect: Width by height of what becomes a square without being distorted.
        """
        areas, shapes = self._drawn[: 2 * CROPS_TRIED].reshape(2, CROPS_TRIED)
        least, most = aspect * LEAST_ASPECT, aspect * MOST_ASPECT
        crop = self.settings.crop
        for area, shape in zip(areas.tolist(), shapes.tolist(), strict=True):
            pixels = width * height * (crop + (1 - crop) * area)
            ratio = least * (most / least) ** shape
            size = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
            if size[0] <= width and size[1] <= height:
                break
        else:
            ratio = min(max(width / height, least), most)
            size = min(width, height * ratio), min(height, width / ratio)
        left, top = (
            place * (whole - part)
            for place, whole, part in zip(
                self._drawn[-6:-4].tolist(), (width, height), size, strict=True
            )
        )
        return left, top, min(left + size[0], width), min(top + size[1], height)

    def change(self, image: Image.Image) -> Image.Image:
        """Return an image flipped, or not, and with other colours."""
        flip, *colours = self._drawn[-4:].tolist()
        if self.settings.flip and self.flippable and flip < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.settings.colour:
            factors = [1 + self.settings.colour * (2 * colour - 1) for colour in colours]
            for enhance, factor in zip(_COLOURS, factors, strict=True):
                image = enhance(image).enhance(factor)
        return image


# The first number of each key, so that what is drawn for one purpose never is for another.
_EPOCHS, _VIEWS, _FIRST_VIEWS = 1, 2, 3


def of_epoch(
    settings: AugmentationConfig, flippable: Sequence[bool], seed: int, epoch: int, image: int
) -> Augmentation:
    """Return what an image of a data set, by its number, gets in an epoch."""
    return Augmentation(settings, flippable[image], (_EPOCHS, seed, epoch, image))


def of_view(
    settings: AugmentationConfig,
    flippable: Sequence[bool],
    contents: Mapping[int, str],
    view: int,
    image: int,
) -> Augmentation:
    """Return what an image gets in a view whose features are kept.

    Args:
        settings: With the seed of the views.
        flippable: Which images may be flipped.
        contents: The hash of each image file, in hexadecimal digits.
        view: The view's number, from 1 on; 0 is the plain image.
        image: The image's number.
    """
    key = (_VIEWS, settings.seed, view, int(contents[image], 16))
    return Augmentation(settings, flippable[image], key)


def views_of_epoch(seed: int, epoch: int, images: int, views: int) -> np.ndarray:
    """Return which view of each image an epoch trains on: (images,), from 0 on.

    An image shows all its views in turn, beginning with a random one.
    """
    first = np.random.default_rng((_FIRST_VIEWS, seed)).integers(views, size=images)
    return (first + epoch) % views
