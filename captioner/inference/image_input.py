"""What ``Captioner`` takes for an image, and how it becomes the CNN's input."""

import io
import os
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from captioner.data.images import Preprocessing, to_rgb
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
    if isinstance(image, (str, os.PathLike)):
        return preprocessing.load(os.fspath(image))
    try:
        return preprocessing(_to_pil(image))
    except ImageError as error:
        raise ImageError(f"{place}: {error}") from None


def _to_pil(image: Any) -> Image.Image:
    if isinstance(image, Tensor):
        return to_rgb(to_pil_image(_to_uint8(image.detach().cpu())))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, _BYTES):
        image = io.BytesIO(image)
    if not isinstance(image, Image.Image) and not hasattr(image, "read"):
        raise ImageError(
            "a path, PIL image, tensor (3, H, W), array (H, W, 3), bytes or open binary file was "
            f"expected, found {type(image).__name__}"
        )
    # Pillow's decoders raise almost anything on damaged files.
    try:
        return to_rgb(image if isinstance(image, Image.Image) else Image.open(image))
    except UnidentifiedImageError:
        raise ImageError("not a readable image (no known format)") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"not a readable image ({reason})") from None


def _from_array(image: np.ndarray) -> Image.Image:
    """Read an array as OpenCV's, imageio's or matplotlib's users know it, in RGB order."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"an array (H, W, 3), (H, W, 4) or (H, W) was expected, found {image.shape}"
        )
    if image.dtype != np.uint8 or not image.size:
        raise ImageError(
            f"an array must hold pixels as uint8, found {image.dtype} of shape {image.shape}"
        )
    return to_rgb(Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image))


def _to_uint8(image: Tensor) -> Tensor:
    if image.dim() != 3 or len(image) not in (1, 3) or not image.numel():
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
