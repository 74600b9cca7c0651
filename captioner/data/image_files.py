"""Image files: which are read, and how each becomes an upright RGB image."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from captioner.errors import ImageError

# Pillow's names of the formats that are read. It knows 40 more; some run other programs.
FORMATS = (
    *("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "TGA", "MPO"),
    "AVIF",
)
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".ico", ".tga"),
}


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
