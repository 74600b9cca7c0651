"""From an image to the pixels that the CNN sees; the same way in training and in use."""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from captioner.checks import check_between
from captioner.data.augmentation import LEAST_ASPECT, Augmentation
from captioner.data.image_files import ImageSource, Reserve, load_image, max_pixels
from captioner.device import give_back_freed_memory
from captioner.errors import ConfigError, ImageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Augment = Callable[[int], Augmentation]
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
    ) -> torch.Tensor:
        """Return the pixels of an RGB image: (3, image_size, image_size), uint8.

        Args:
            image: Of any size.
            augmentation: How it is changed, in training.
        """
        mode = InterpolationMode(self.interpolation)
        if augmentation and augmentation.crops:
            image = self._crop(image, augmentation)
        elif self.resize == "squash":
            image = transforms.resize(image, [self.image_size, self.image_size], mode)
        else:
            image = transforms.resize(_without_ends(image), [self.resize_size], mode)
            image = transforms.center_crop(image, [self.image_size, self.image_size])
        if augmentation:
            image = augmentation.change(image)
        return transforms.pil_to_tensor(image)

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
    ) -> torch.Tensor:
        """Return the pixels of an image: (3, image_size, image_size), uint8.

        The arguments and errors are those of ``load_with_size``.
        """
        return self.load_with_size(source, reserve, name, augmentation)[0]

    def load_with_size(
        self,
        source: ImageSource,
        reserve: Reserve | None = None,
        name: str = "",
        augmentation: Augmentation | None = None,
    ) -> tuple[torch.Tensor, Size]:
        """Return the pixels of an image, (3, image_size, image_size), uint8, and its own size.

        Args:
            source: A path, bytes, an open binary file, or Pillow's image.
            reserve: As ``load_image`` takes it.
            name: What messages call the image; by default its path.
            augmentation: How it is changed, in training.

        Raises:
            ImageError: It can't be read, or is too large.
            MemoryError: There is too little memory for it.
        """
        # At twice the size and more, what is scaled down beforehand can't be told apart after.
        least = 2 * (self.image_size if self.resize == "squash" else self.resize_size)
        if augmentation and augmentation.crops:  # a part of it fills the square
            least = math.ceil(least / math.sqrt(augmentation.settings.crop * LEAST_ASPECT))
        image = load_image(source, least, reserve, name)
        return self(image, augmentation), image.info["original_size"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def _without_ends(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = LONGEST_STRIP * min(width, height)
    if max(width, height) <= longest:
        return image
    return transforms.center_crop(image, [min(height, longest), min(width, longest)])


@dataclass
class PixelBatch:
    """Some images of a list, decoded.

    Attributes:
        indices: Which images of the list these are, of length B.
        pixels: (B, 3, S, S), uint8.
        failures: (index, message) of those that couldn't be read.
        sizes: Of the B images in their files.
    """

    indices: list[int]
    pixels: torch.Tensor
    failures: list[tuple[int, str]]
    sizes: list[Size] = field(default_factory=list)

    def pin_memory(self) -> "PixelBatch":
        """Return it with its pixels in pinned memory; DataLoader calls this for a GPU."""
        return dataclasses.replace(self, pixels=self.pixels.pin_memory())


def load_pixels(
    paths: Sequence[str | Path],
    preprocessing: Preprocessing,
    batches: Sequence[Sequence[int]],
    device: torch.device,
    workers: int = -1,
    augment: Augment | None = None,
) -> Iterator[PixelBatch]:
    """Decode and preprocess images, batch by batch, in order.

    Args:
        paths: All image files.
        preprocessing: What is done to each.
        batches: Indices into ``paths``, a list for each batch.
        device: What computes with the pixels; see ``stream_pixels``.
        workers: Processes or threads; see ``stream_pixels``.
        augment: How an image of ``paths`` is changed in training, by its index.
    """
    named = ([(index, paths[index]) for index in batch] for batch in batches)
    workers = workers if len(batches) > 1 or device.type == "cpu" else 0
    return stream_pixels(named, preprocessing, device, workers, augment)


def stream_pixels(
    batches: Iterable[Sequence[tuple[int, str | Path]]],
    preprocessing: Preprocessing,
    device: torch.device,
    workers: int = -1,
    augment: Augment | None = None,
) -> Iterator[PixelBatch]:
    """Decode and preprocess images, batch by batch, in order, however many there are.

    For a GPU worker processes decode the next batches while it computes. On a CPU that computes
    itself they would only take its cores away at the wrong moment: there threads decode a batch
    when it is asked for, and end before the computing starts.

    Args:
        batches: An index and a path for each image of a batch. A batch is asked for in the
            caller's thread, not long before it is decoded.
        preprocessing: What is done to each.
        device: What computes with the pixels; they are not moved there.
        workers: Processes or threads; 0 decodes in this one, -1 takes one a core (16 at most).
            All together hold about 1 GiB of large images at a time (``DecodingMemory``). An image
            for which memory runs out is read again while no other large one is held; then it fails.
        augment: How an image is changed in training, by its index.
    """
    max_pixels()  # if it is set wrong, that is said here
    if workers < 0:
        workers = min(16, count_cores())
    in_threads = device.type == "cpu" and workers > 0
    files = _ImageFiles(preprocessing, DecodingMemory(processes=not in_threads), augment)
    if in_threads:
        return _load_in_threads(files, batches, workers)
    return iter(
        DataLoader(
            files,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=_collate,
            num_workers=workers,
            generator=torch.Generator(),  # its own: dropout's random numbers stay as they are
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_ctrl_c,
        )
    )


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends Ctrl-C to all processes: what it ends is for the main one to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load_in_threads(
    files: "_ImageFiles", batches: Iterable[Sequence[tuple[int, str | Path]]], workers: int
) -> Iterator[PixelBatch]:
    with ThreadPoolExecutor(workers) as threads:
        for batch in batches:
            yield _collate(list(threads.map(files.__getitem__, batch)))


def in_batches(count: int, batch_size: int) -> list[range]:
    """Return the indices 0 to ``count`` - 1 in batches."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


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


_Loaded = tuple[int, torch.Tensor | None, Size, str]


class _ImageFiles(Dataset):
    """Image files as DataLoader takes them; indexed by an index and a path."""

    def __init__(
        self, preprocessing: Preprocessing, memory: DecodingMemory, augment: Augment | None = None
    ) -> None:
        self.preprocessing, self.memory, self.augment = preprocessing, memory, augment

    def __getitem__(self, image: tuple[int, str | Path]) -> _Loaded:
        index, path = image
        for alone in (False, True):  # the memory that others hold may be what it lacks
            try:
                return index, *self._load(index, path, alone), ""
            except ImageError as error:
                return index, None, (0, 0), str(error)
            except MemoryError:
                pass  # what the failed try held is free again after this clause
        message = "there is too little memory to read it; free some, or scale the image down"
        return index, None, (0, 0), f"{path}: {message}"

    def _load(self, index: int, path: str | Path, alone: bool) -> tuple[torch.Tensor, Size]:
        with self.memory.reader() as reserve:
            if alone:
                reserve(self.memory.BLOCK_BYTES * self.memory.BLOCKS)
            augmentation = self.augment(index) if self.augment else None
            return self.preprocessing.load_with_size(path, reserve, augmentation=augmentation)


def _collate(items: list[_Loaded]) -> PixelBatch:
    good = [(index, pixels, size) for index, pixels, size, _ in items if pixels is not None]
    return PixelBatch(
        indices=[index for index, _, _ in good],
        pixels=torch.stack([pixels for _, pixels, _ in good]) if good else torch.empty(0),
        failures=[(index, message) for index, pixels, _, message in items if pixels is None],
        sizes=[size for _, _, size in good],
    )
