"""What ``Captioner`` takes for an image, and how it becomes the CNN's input."""

import os
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from captioner.data.image_files import UNNAMED, ImageSource
from captioner.data.preprocessing import Preprocessing
from captioner.errors import ImageError

ImageLike = str | os.PathLike[str] | Image.Image | Tensor | np.ndarray | bytes | BinaryIO

_BYTES = (bytes, bytearray, memoryview)


def is_single(images: Any) -> bool:
    """Tell one image from several: a tensor or array of four axes is a batch."""
    if isinstance(images, (Tensor, np.ndarray)):
        return images.ndim in (2, 3)
    return isinstance(images, (str, os.PathLike, Image.Image, *_BYTES)) or hasattr(images, "read")


def name_of(image: Any, place: str) -> str:
    """Return what a message calls an image: its path, or ``place`` where it has none."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else place


def load_input(image: ImageLike, preprocessing: Preprocessing, place: str) -> Tensor:
    """Return the pixels of an image in any form: (3, image_size, image_size), uint8.

    Args:
        image: The image, see ``Captioner.caption``.
        preprocessing: What is done to it.
        place: What a message calls an image that isn't a path.

    Raises:
        ImageError: It can't be read, or it isn't an image.
    """
    try:
        return preprocessing.load(_to_source(image))
    except ImageError as error:
        raise ImageError(str(error).replace(UNNAMED, place, 1)) from None


def _to_source(image: Any) -> ImageSource:
    if isinstance(image, os.PathLike):
        return os.fspath(image)
    if isinstance(image, (str, Image.Image)) or hasattr(image, "read"):
        return image
    if isinstance(image, _BYTES):
        return bytes(image)
    if isinstance(image, Tensor):
        return to_pil_image(_to_uint8(image.detach().cpu()))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise ImageError(
        f"{UNNAMED}: a path, PIL image, tensor (3, H, W), array (H, W, 3), bytes or open binary "
        f"file was expected, found {type(image).__name__}"
    )


def _from_array(image: np.ndarray) -> Image.Image:
    """Read an array as OpenCV's, imageio's or matplotlib's users know it, in RGB order."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"{UNNAMED}: an array (H, W, 3), (H, W, 4) or (H, W) was expected, found {image.shape}"
        )
    if image.dtype != np.uint8 or not image.size:
        raise ImageError(
            f"{UNNAMED}: an array must hold pixels as uint8, found {image.dtype} of shape "
            f"{image.shape}"
        )
    return Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)


def _to_uint8(image: Tensor) -> Tensor:
    if image.dim() != 3 or len(image) not in (1, 3) or not image.numel():
        raise ImageError(f"{UNNAMED}: a tensor (3, H, W) was expected, found {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image
    lowest, highest = image.min().item(), image.max().item()
    if not image.is_floating_point() or not (lowest >= 0 and highest <= 1):
        raise ImageError(
            f"{UNNAMED}: a tensor must be uint8, or float from 0 to 1 (not yet normalised by mean "
            "and standard deviation: the captioner does that); found "
            f"{image.dtype} from {lowest} to {highest}"
        )
    return (image.float() * 255).round().to(torch.uint8)
