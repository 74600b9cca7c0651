"""Captions for images, from Python."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import overload

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from captioner.config import SearchConfig
from captioner.device import choose_device, choose_precision
from captioner.errors import ConfigError, ImageError
from captioner.features import encode
from captioner.images import load_image, to_rgb
from captioner.model import CaptionModel, load_checkpoint
from captioner.search import Hypothesis

ImageLike = str | Path | Image.Image | Tensor


class Captioner:
    """A trained captioner, ready for use.

    Example:
        >>> captioner = Captioner.from_pretrained("runs/coco/best")
        >>> captioner.caption("dog.jpg", beam_size=5)
        'a dog is running on the beach'

    Args:
        model: The model; it is moved to ``device``.
        device: "auto" (CUDA, else MPS, else CPU) or a device's name.
        precision: "auto" (bfloat16 where it is native), "bfloat16" or "float32".
    """

    def __init__(self, model: CaptionModel, device: str = "auto", precision: str = "auto") -> None:
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.model = model.to(self.device).eval()

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str = "auto", precision: str = "auto"
    ) -> "Captioner":
        """Load a checkpoint directory, such as ``RUN/best``.

        Raises:
            CheckpointError: It is missing, damaged or inconsistent.
        """
        return cls(load_checkpoint(directory), device, precision)

    @overload
    def caption(  # type: ignore[overload-overlap] # a str or a tensor is one image
        self,
        images: ImageLike,
        beam_size: int | None = ...,
        max_length: int | None = ...,
        length_penalty: float | None = ...,
        batch_size: int = ...,
    ) -> str: ...

    @overload
    def caption(
        self,
        images: Iterable[ImageLike],
        beam_size: int | None = ...,
        max_length: int | None = ...,
        length_penalty: float | None = ...,
        batch_size: int = ...,
    ) -> list[str]: ...

    def caption(
        self,
        images: ImageLike | Iterable[ImageLike],
        beam_size: int | None = None,
        max_length: int | None = None,
        length_penalty: float | None = None,
        batch_size: int = 32,
    ) -> str | list[str]:
        """Caption one image or many.

        Args:
            images: Paths, PIL images, or tensors (3, H, W), uint8 or float from 0 to 1; one, or
                any number of them, such as a list or a generator. A tensor (B, 3, H, W) is B
                images.
            beam_size: Hypotheses kept; 1 is greedy. None takes the checkpoint's setting.
            max_length: Most words in a caption. None takes the checkpoint's setting.
            length_penalty: See ``search.beam_search``. None takes the checkpoint's setting.
            batch_size: Images encoded and decoded at a time.

        Returns:
            A caption for one image, a list for many.

        Raises:
            ImageError: An image can't be read, or a tensor holds something else.
            ConfigError: A setting is impossible.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size: at least 1 was expected, found {batch_size}")
        search = self.search(beam_size, max_length, length_penalty)
        if isinstance(images, (str, Path, Image.Image)) or (
            isinstance(images, Tensor) and images.dim() == 3
        ):
            return self._caption([images], search)[0]
        captions: list[str] = []
        left = iter(images)
        while batch := list(islice(left, batch_size)):
            captions += self._caption(batch, search)
        return captions

    def search(
        self,
        beam_size: int | None = None,
        max_length: int | None = None,
        length_penalty: float | None = None,
    ) -> SearchConfig:
        """Return the checkpoint's search settings with these changes."""
        given = {
            "beam_size": beam_size,
            "max_length": max_length,
            "length_penalty": length_penalty,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        return replace(self.model.search, **changes)  # type: ignore[arg-type]

    def hypotheses(self, pixels: Tensor, search: SearchConfig) -> list[list[Hypothesis]]:
        """Return the captions found for preprocessed pixels (B, 3, S, S), uint8, best first."""
        features = encode(self.model.encoder, pixels, self.device, self.precision)
        return self.model.decode(features, search, self.precision)

    def _caption(self, images: list[ImageLike], search: SearchConfig) -> list[str]:
        preprocess = self.model.encoder.preprocessing
        pixels = torch.stack([preprocess(_open(image)) for image in images])
        return self.model.words(self.hypotheses(pixels, search))


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, Tensor):
        return to_rgb(to_pil_image(_to_uint8(image.cpu())))
    return to_rgb(image) if isinstance(image, Image.Image) else load_image(image)


def _to_uint8(image: Tensor) -> Tensor:
    if image.dim() != 3 or len(image) not in (1, 3):
        raise ImageError(f"a tensor (3, H, W) was expected, found {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image
    lowest, highest = image.min().item(), image.max().item()
    if not image.is_floating_point() or not (lowest >= 0 and highest <= 1):
        raise ImageError(
            "a tensor must be uint8, or float from 0 to 1 (not yet normalised by mean and standard "
            f"deviation: the captioner does that); found {image.dtype} from {lowest} to {highest}"
        )
    return (image.float() * 255).round().to(torch.uint8)
