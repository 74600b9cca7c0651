"""From an image file to the pixels that the CNN sees; the same way in training and in use."""

import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from captioner.errors import ImageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# A strip longer than this times its width is cut before it is scaled: 10 x 100,000 pixels would
# otherwise become 224 x 2,240,000. The centre square is the same.
LONGEST_STRIP = 8


def load_image(path: str | Path, least: int = 0) -> Image.Image:
    """Read an image file as upright RGB, whatever its mode, bit depth or rotation.

    Transparency becomes white; of an animation the first frame is taken.

    Args:
        path: The file.
        least: A large JPEG may come out at 1/2, 1/4 or 1/8 of its size, which its decoder does for
            next to nothing, as long as both sides keep this many pixels; 0 keeps the size.

    Raises:
        ImageError: It can't be read; the message names the file and the reason.
    """
    try:
        with Image.open(path) as image:
            if least:
                image.draft(None, (least, least))
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    # Pillow's decoders raise almost anything on damaged files, and one of them must not end a
    # job over a million.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"{path}: not a readable image ({reason})") from None


def load_thumbnail(path: str | Path, size: int = 256) -> Image.Image:
    """Return an image, as ``load_image`` reads it, with neither side longer than ``size``."""
    image = load_image(path, size)
    image.thumbnail((size, size))
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image turned upright by its EXIF tag, as 8-bit RGB."""
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")  # a copy
    image.info.clear()  # with the EXIF tag gone, turning it again does nothing
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    # Damaged EXIF raises almost anything, and is no reason to lose the picture.
    except Exception:
        return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip it to white."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":  # no fixed range: stretch the one that is used
        values = values - values.min()
        values = values * (65535 / (values.max() or 1.0))
    return Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8))


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the CNN's input. It belongs to the weights and travels with them.

    Attributes:
        resize: "crop" (shorter side to ``resize_size``, then the centre square) or "squash" (the
            whole image to the square).
        image_size: Side of the square, in pixels.
        resize_size: Length of the shorter side before the cut, in pixels.
        interpolation: "bilinear" or "bicubic".
        mean, std: Subtracted from and divides red, green, blue (0 to 1), inside the encoder.
    """

    resize: str = "crop"
    image_size: int = 224
    resize_size: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the pixels of an RGB image: (3, image_size, image_size), uint8."""
        mode = InterpolationMode(self.interpolation)
        if self.resize == "squash":
            image = transforms.resize(image, [self.image_size, self.image_size], mode)
        else:
            image = transforms.resize(_without_ends(image), [self.resize_size], mode)
            image = transforms.center_crop(image, [self.image_size, self.image_size])
        return transforms.pil_to_tensor(image)

    def load(self, path: str | Path) -> torch.Tensor:
        """Return the pixels of an image file: (3, image_size, image_size), uint8.

        Raises:
            ImageError: It can't be read.
        """
        # At twice the size and more, what is scaled down beforehand can't be told apart after.
        least = 2 * (self.image_size if self.resize == "squash" else self.resize_size)
        return self(load_image(path, least))

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
    """

    indices: list[int]
    pixels: torch.Tensor
    failures: list[tuple[int, str]]

    def pin_memory(self) -> "PixelBatch":
        """Return it with its pixels in pinned memory; DataLoader calls this for a GPU."""
        return PixelBatch(self.indices, self.pixels.pin_memory(), self.failures)


def load_pixels(
    paths: Sequence[str | Path],
    preprocessing: Preprocessing,
    batches: Sequence[Sequence[int]],
    device: torch.device,
    workers: int = -1,
) -> Iterator[PixelBatch]:
    """Decode and preprocess images, batch by batch, in order.

    For a GPU worker processes decode the next batches while it computes. On a CPU that computes
    itself they would only take its cores away at the wrong moment: there threads decode a batch
    when it is asked for, and end before the computing starts.

    Args:
        paths: All image files.
        preprocessing: What is done to each.
        batches: Indices into ``paths``, a list for each batch.
        device: What computes with the pixels; they are not moved there.
        workers: Processes or threads; 0 decodes in this one, -1 takes one a core (16 at most).
    """
    if workers < 0:
        workers = min(16, _cores())
    files = _ImageFiles(paths, preprocessing)
    if device.type == "cpu" and workers:
        return _load_in_threads(files, batches, workers)
    return iter(
        DataLoader(
            files,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=_collate,
            num_workers=workers if len(batches) > 1 else 0,
            generator=torch.Generator(),  # its own: dropout's random numbers stay as they are
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_ctrl_c,
        )
    )


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends Ctrl-C to all processes: what it ends is for the main one to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load_in_threads(
    files: "_ImageFiles", batches: Sequence[Sequence[int]], workers: int
) -> Iterator[PixelBatch]:
    with ThreadPoolExecutor(workers) as threads:
        for batch in batches:
            yield _collate(list(threads.map(files.__getitem__, batch)))


def in_batches(count: int, batch_size: int) -> list[range]:
    """Return the indices 0 to ``count`` - 1 in batches."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def _cores() -> int:
    """Return how many cores this process may use (a container or job may have fewer)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _ImageFiles(Dataset):
    def __init__(self, paths: Sequence[str | Path], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, str]:
        try:
            return index, self.preprocessing.load(self.paths[index]), ""
        except ImageError as error:
            return index, None, str(error)


def _collate(items: list[tuple[int, torch.Tensor | None, str]]) -> PixelBatch:
    good = [(index, pixels) for index, pixels, _ in items if pixels is not None]
    return PixelBatch(
        indices=[index for index, _ in good],
        pixels=torch.stack([pixels for _, pixels in good]) if good else torch.empty(0),
        failures=[(index, message) for index, pixels, message in items if pixels is None],
    )
