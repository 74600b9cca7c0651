"""From an image to the pixels that the CNN sees; the same way in training and in use.

Nothing here needs torch until a tensor is asked for: ``captioner.runtime`` does without.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from captioner.checks import check_between
from captioner.data.augmentation import Augmentation
from captioner.data.image_files import ImageSource, Reserve, load_image
from captioner.errors import ConfigError
from captioner.memory import give_back_freed_memory

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]  # width and height of an image as it is seen, in pixels

RESIZES, INTERPOLATIONS = ("crop", "squash"), ("bilinear", "bicubic")

# A strip longer than this times its width is cut before it is scaled: 10 x 100,000 pixels would
# otherwise become 224 x 2,240,000. The centre square is the same.
LONGEST_STRIP = 8


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the CNN's input. It belongs to the weights and travels with them.

    Attributes:
        resize: "crop" (shorter side to ``resize_size``, then the centre square) or "squash" (the
            whole image to the square).
        image_size: Side of the square, 1 to 2,048 pixels.
        resize_size: Length of the shorter side before the cut, 1 to 4,096 pixels.
        interpolation: "bilinear" or "bicubic".
        mean, std: Subtracted from and divides red, green, blue (0 to 1), inside the encoder; at
            most 1e6, and the latter at least 1e-6.

    Raises:
        ConfigError: A value is another or impossible.
    """

    resize: str = "crop"
    image_size: int = 224
    resize_size: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_between(self, image_size=(1, 2048), resize_size=(1, 4096))
        for name, known in (("resize", RESIZES), ("interpolation", INTERPOLATIONS)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(
                    f"preprocessing.{name}: '{known[0]}' or '{known[1]}' was expected, found "
                    f"{value!r}"
                )
        if self.resize == "crop" and self.resize_size < self.image_size:
            raise ConfigError(
                f"preprocessing.resize_size ({self.resize_size}) must be at least "
                f"preprocessing.image_size ({self.image_size})"
            )
        for name, least in (("mean", -1e6), ("std", 1e-6)):
            values = getattr(self, name)
            if len(values) != 3 or not all(least <= value <= 1e6 for value in values):
                raise ConfigError(
                    f"preprocessing.{name}: three numbers from {least:g} to 1e+06 were expected, "
                    f"found {values}"
                )

    def __call__(
        self, image: Image.Image, augmentation: Augmentation | None = None
    ) -> "torch.Tensor":
        """Return the pixels of an RGB image as a tensor: (3, image_size, image_size), uint8.

        Args:
            image: Of any size.
            augmentation: How it is changed, in training.
        """
        import torch

        return torch.from_numpy(to_pixels(self.square(image, augmentation)))

    def square(self, image: Image.Image, augmentation: Augmentation | None = None) -> Image.Image:
        """Return what the CNN sees of an RGB image, image_size x image_size pixels.

        The arguments are those of a call.
        """
        resampling = Image.Resampling[self.interpolation.upper()]
        if augmentation and augmentation.crops:
            image = self._crop(image, augmentation)
        elif self.resize == "squash":
            image = image.resize((self.image_size, self.image_size), resampling)
        else:
            image = _without_ends(image)
            short = min(image.size)
            width, height = (self.resize_size * side // short for side in image.size)
            image = image.resize((width, height), resampling)
            image = _centre(image, self.image_size, self.image_size)
        return augmentation.change(image) if augmentation else image

    def _crop(self, image: Image.Image, augmentation: Augmentation) -> Image.Image:
        """Scale a random part of an image to the square."""
        image = image if self.resize == "squash" else _without_ends(image)
        width, height = image.size
        box = augmentation.crop_box(width, height, width / height if self.resize == "squash" else 1)
        resampling = Image.Resampling[self.interpolation.upper()]
        return image.resize((self.image_size, self.image_size), resampling, box)

    def load(
        self,
        source: ImageSource,
        reserve: Reserve | None = None,
        name: str = "",
        augmentation: Augmentation | None = None,
    ) -> "torch.Tensor":
        """Return the pixels of an image: (3, image_size, image_size), uint8.

        The arguments and errors are those of ``open``.
        """
        return self(self.open(source, reserve, name, augmentation), augmentation)

    def load_square(
        self, source: ImageSource, reserve: Reserve | None = None, name: str = ""
    ) -> tuple[Image.Image, Size]:
        """Return what the CNN sees of an image, and the image's own size.

        The arguments and errors are those of ``open``.
        """
        image = self.open(source, reserve, name)
        return self.square(image), image.info["original_size"]

    def open(
        self,
        source: ImageSource,
        reserve: Reserve | None = None,
        name: str = "",
        augmentation: Augmentation | None = None,
    ) -> Image.Image:
        """Read an image, as large as the square of it needs.

        Args:
            source: A path, bytes, an open binary file, or Pillow's image.
            reserve: As ``load_image`` takes it.
            name: What messages call the image; by default its path.
            augmentation: How it is to be changed, in training.

        Raises:
            ImageError: It can't be read, or is too large.
            MemoryError: There is too little memory for it.
        """
        # At twice the size and more, what is scaled down beforehand can't be told apart after.
        least = 2 * (self.image_size if self.resize == "squash" else self.resize_size)
        if augmentation and augmentation.crops:  # a part of it fills the square
            least = math.ceil(least / augmentation.least_side)
        return load_image(source, least, reserve, name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def to_pixels(square: Image.Image) -> np.ndarray:
    """Return an RGB image as (3, H, W), uint8."""
    return np.array(np.asarray(square).transpose(2, 0, 1), order="C")


def _without_ends(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = LONGEST_STRIP * min(width, height)
    if max(width, height) <= longest:
        return image
    return _centre(image, min(width, longest), min(height, longest))


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the middle of an image, rounded as torchvision's ``center_crop`` does."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def count_cores() -> int:
    """Return how many cores this process may use (a container or job may have fewer)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class DecodingMemory:
    """What all readers of images may hold together while they decode: 1 GiB.

    An image that takes less than 16 MiB, as almost all do, isn't counted and waits for none; one
    that takes more than all there is waits until it is the only one. In threads glibc may keep up
    to 64 MiB for each, freed, unless ``keep_freed_memory`` was called.

    Args:
        processes: Whether the readers are processes; otherwise they are threads.
    """

    BLOCK_BYTES, BLOCKS = 16 << 20, 64

    def __init__(self, processes: bool) -> None:
        kind: Any = multiprocessing if processes else threading
        self._blocks = kind.Semaphore(self.BLOCKS)
        self._turn = kind.Lock()  # two that wait with half of what they need would wait for ever

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reserve]:
        """Give a function that waits until so many bytes may be used: until the context ends."""
        count = 0

        def reserve(size: int) -> None:
            nonlocal count
            with self._turn if size >= self.BLOCK_BYTES else contextlib.nullcontext():
                while count < min(size // self.BLOCK_BYTES, self.BLOCKS):
                    self._blocks.acquire()
                    count += 1

        try:
            yield reserve
        finally:
            if count:
                give_back_freed_memory()  # else each thread would keep its own
            for _ in range(count):
                self._blocks.release()
