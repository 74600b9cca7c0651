"""Image files: how large they may be, and how each becomes upright RGB."""

import contextlib
import importlib
import io
import math
import os
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, TiffImagePlugin

from captioner.data.image_formats import open_image, pixels_of_png
from captioner.errors import ConfigError, ImageError
from captioner.files import open_regular

# What an image may be: a path, the content of a file, an open binary file, or Pillow's image.
ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image
# Waits until so many bytes may be used.
Reserve = Callable[[int], object]

UNNAMED = "the image given"  # what messages call an image without a name
MAX_MEGAPIXELS_VARIABLE = "CAPTIONER_MAX_MEGAPIXELS"
MAX_MEGAPIXELS = 64.0
MOST_BYTES_OF_PIXEL = 16  # in a file
# Each scan of a progressive JPEG is another pass over all its pixels; encoders write about 10.
USUAL_SCANS = 16
# Larger images, if they will be scaled down anyway, are so by a whole number first.
EXACT_PIXELS = 16_000_000
STRIP_PIXELS = 1 << 20  # converted at a time
# Bytes a pixel, as measured, that decoding takes at its peak, and converting and turning after it.
DECODER_BYTES = {"WEBP": 16, "AVIF": 10, "HEIF": 12, "JPEG2000": 20, "TIFF": 12}
OTHER_DECODER_BYTES, CONVERSION_BYTES = 4, 8
TILE_WIDTH, TILE_LENGTH = 322, 323  # of TIFF
QUARTER_TURNS = range(5, 9)  # orientations of EXIF that exchange width and height


def load_image(
    source: ImageSource, least: int = 0, reserve: Reserve | None = None, name: str = ""
) -> Image.Image:
    """Read an image as upright RGB, whatever its mode, bit depth or rotation.

    Transparency becomes white; of an animation the first frame is taken. The pixels are the same
    whether a path, bytes, a file or Pillow's image is given, as long as Pillow hasn't decoded it
    yet: a large JPEG that it has is no longer scaled by its decoder.

    Args:
        source: The image. Pillow's image is not changed.
        least: A large JPEG may come out at 1/2, 1/4 or 1/8 of its size, which its decoder does for
            next to nothing, as long as both sides keep this many pixels; and any image of more
            than 16 megapixels scaled down by a whole number. 0 keeps the size.
        reserve: Called, before the image is decoded, with how many bytes that takes.
        name: What messages call the image; by default its path.

    Returns:
        The image; its ``info["original_size"]`` is the width and height, in pixels, that it has in
        the file, turned upright.

    Raises:
        ImageError: It can't be read, or it is too large (``max_pixels``); the message names the
            file and the reason.
        MemoryError: There is too little memory for it.
    """
    name = name or _name(source)
    with _errors_named(name), _opened(source) as image:
        try:
            return _decode(image, least, reserve, name)
        except (ValueError, SyntaxError):
            file = getattr(image, "fp", None)
            if image.format != "PNG" or not file:
                raise
            return _decode(open_image(pixels_of_png(file)), least, reserve, name)


def _decode(image: Image.Image, least: int, reserve: Reserve | None, name: str) -> Image.Image:
    original_size = image.size
    if least and isinstance(image, JpegImagePlugin.JpegImageFile):  # others give thumbnails
        image.draft(None, (least, least))
    size = _check_size(image, name, least)
    if reserve:
        reserve(size)
    rgb = to_rgb(image, least)
    is_turned = _orientation(image) in QUARTER_TURNS
    rgb.info["original_size"] = original_size[::-1] if is_turned else original_size
    return rgb


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Turn what goes wrong in reading an image into an ``ImageError`` that names it."""
    try:
        yield
    except (ImageError, ConfigError, MemoryError):
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more pixels than Pillow reads; scale it down") from None
    # Pillow's decoders raise almost anything on damaged files, and one of them must not end a
    # job over a million.
    except Exception as error:
        if "out of memory" in str(error):  # as some decoders tell it
            raise MemoryError(f"{name}: {error}") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{name}: not a readable image ({reason.splitlines()[0]})") from None


def load_thumbnail(
    source: ImageSource, size: int = 256, reserve: Reserve | None = None
) -> Image.Image:
    """Return an image, as ``load_image`` reads it, with neither side longer than ``size``."""
    image = load_image(source, size, reserve)
    image.thumbnail((size, size))
    return image


def max_pixels() -> int:
    """Return how many pixels of an image are decoded at most.

    64 million, or what the environment variable CAPTIONER_MAX_MEGAPIXELS says.

    Raises:
        ConfigError: The variable holds no number above 0.
    """
    text = os.environ.get(MAX_MEGAPIXELS_VARIABLE) or MAX_MEGAPIXELS
    with contextlib.suppress(ValueError):
        if 0 < (megapixels := float(text)) < math.inf:
            return int(megapixels * 1e6)
    raise ConfigError(f"{MAX_MEGAPIXELS_VARIABLE}: a number above 0 was expected, found {text!r}")


# --- opening ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """Give Pillow's image of a source, its header read; not yet decoded where that can be had."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, Image.Image):
            yield _read_again(source, stack)
        elif is_remote(source):
            yield _open_file(_read_remote(str(source)))
        elif isinstance(source, (str, os.PathLike)):
            yield _open_file(stack.enter_context(open_regular(os.fspath(source))))
        elif isinstance(source, bytes):
            yield _open_file(io.BytesIO(source))
        else:
            yield _open_file(source if source.seekable() else io.BytesIO(source.read()))


def _read_again(image: Image.Image, stack: contextlib.ExitStack) -> Image.Image:
    """Read an image that isn't decoded yet from its file again.

    Having the one that was given scaled by its decoder would change it.
    """
    file = getattr(image, "fp", None)  # None once it is decoded
    if file is None or image.tell():  # not the first frame
        return image
    stack.callback(file.seek, file.tell())
    again = _open_file(file)
    return again if (again.size, again.mode) == (image.size, image.mode) else image


def is_remote(source: ImageSource) -> bool:
    """Tell whether an image's path is an address, such as ``s3://bucket/dog.jpg``."""
    return isinstance(source, str) and "://" in source


def _read_remote(address: str) -> BinaryIO:
    """Return what is at an address, which fsspec reads."""
    try:
        fsspec = importlib.import_module("fsspec")
    except ImportError:
        raise ValueError("for addresses: pip install fsspec") from None
    with fsspec.open(address, "rb") as file:
        return io.BytesIO(file.read(MOST_BYTES_OF_PIXEL * max_pixels()))


def _open_file(file: BinaryIO) -> Image.Image:
    if file.seek(0, os.SEEK_END) > MOST_BYTES_OF_PIXEL * max_pixels():  # some are read as a whole
        raise ValueError(f"a file of {file.tell() / 1e9:.1f} GB")
    return open_image(file)


def _name(source: ImageSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "filename" if isinstance(source, Image.Image) else "name", "")
    return name if name and isinstance(name, str) else UNNAMED


# --- limits -----------------------------------------------------------------------------------


def _check_size(image: Image.Image, name: str, least: int) -> int:
    """Return how many bytes decoding and converting an image takes, roughly, and at most.

    Raises:
        ImageError: It has too many pixels.
    """
    pixels, scans, coefficients = math.prod(image.size), 1, 0
    undecoded = getattr(image, "fp", None)
    if isinstance(image, JpegImagePlugin.JpegImageFile) and undecoded:
        scans = _count_scans(image, undecoded)
        if scans > 1:  # it is held in whole, scaled or not
            pixels = math.prod(image.decoderconfig[:1] or (1,)) ** 2 * pixels
            coefficients = 2 * image.layers * pixels
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        tile = image.tag_v2.get(TILE_WIDTH, 0) * image.tag_v2.get(TILE_LENGTH, 0)
        pixels = max(pixels, tile)
    counted, limit = max(pixels, pixels * scans // USUAL_SCANS), max_pixels()
    if counted > limit and undecoded:
        many = f" in {scans} scans" if scans > USUAL_SCANS else ""
        raise ImageError(
            f"{name}: {pixels / 1e6:.1f} megapixels{many} are too many; scale it down, or set the "
            f"environment variable {MAX_MEGAPIXELS_VARIABLE}={math.ceil(counted / 1e6)}"
        )
    bytes_each = DECODER_BYTES.get(image.format or "", OTHER_DECODER_BYTES)
    if _whole_factor(image.size, least) == 1:
        bytes_each += CONVERSION_BYTES
    return coefficients + bytes_each * math.prod(image.size)


def _count_scans(image: JpegImagePlugin.JpegImageFile, file: BinaryIO) -> int:
    """Return in how many scans a JPEG is stored, whose header alone has been read."""
    start = file.tell()  # of the first scan's data, behind its own header
    try:
        header = struct.pack(">HHB", 0xFFDA, 6 + 2 * image.layers, image.layers)
        file.seek(start - 8 - 2 * image.layers)
        if file.read(5) == header and "progressive" not in image.info:
            return 1  # with all colours in it, as usual
        file.seek(start)
        scans, last = 1, b""
        while block := file.read(1 << 20):
            data, end, _ = (last + block).partition(b"\xff\xd9")
            scans += data.count(b"\xff\xda")
            if end:
                break
            last = block[-1:] if block.endswith(b"\xff") else b""
        return scans
    finally:
        file.seek(start)


# --- conversion -------------------------------------------------------------------------------


def to_rgb(image: Image.Image, least: int = 0) -> Image.Image:
    """Return an image turned upright by its EXIF tag, as 8-bit RGB.

    Args:
        image: Of any mode; it is not changed.
        least: As in ``load_image``; here for other images than JPEGs.
    """
    image.load()  # some formats have their EXIF after the pixels
    orientation = _orientation(image)
    rgb = _convert(image, _whole_factor(image.size, least))
    rgb.info.clear()
    if orientation:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)  # of small pixels; the tag is gone after it
    return rgb


def _orientation(image: Image.Image) -> int:
    """Return what an image's EXIF says of its orientation, 1 to 8; 0 where it says nothing.

    HEIF is turned by its decoder, whatever its EXIF says.
    """
    if image.format == "HEIF":
        return 0
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Damaged EXIF raises almost anything, and is no reason to lose the picture.
    except Exception:
        return 0
    return orientation if isinstance(orientation, int) else 0


def _whole_factor(size: tuple[int, int], least: int) -> int:
    """Return by what to divide the sides of a large image, so that both keep ``least`` pixels."""
    large = least and math.prod(size) > EXACT_PIXELS
    return max(1, min(size) // least) if large else 1


def _convert(image: Image.Image, factor: int) -> Image.Image:
    """Convert to RGB and scale down by a whole number.

    Strip by strip: conversions take up to 16 bytes a pixel in between.
    """
    grey_range = _grey_range(image)
    width, height = image.size
    rows = factor * max(1, STRIP_PIXELS // (width * factor))
    if rows >= height and factor == 1:
        return _convert_strip(image, *grey_range)
    rgb = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        strip = _convert_strip(strip, *grey_range)
        rgb.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    return rgb


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """Return which values of more than 8 bits become black and white.

    Fractions have no fixed range, so the one that is used is stretched, and so is that of integers
    that don't fit into 16 bits. What is no finite number counts as nothing.
    """
    lowest, highest = 0.0, 65535.0
    if image.mode == "I":
        least, most = cast("tuple[int, int]", image.getextrema())
        if least < lowest or most > highest:
            lowest, highest = least, most
    if image.mode == "F":
        values = np.asarray(image)
        finite = np.isfinite(values)
        lowest = float(values.min(where=finite, initial=np.inf))
        highest = float(values.max(where=finite, initial=-np.inf))
    return (lowest, highest) if lowest <= highest else (0.0, 1.0)  # without any number


def _convert_strip(image: Image.Image, lowest: float, highest: float) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion would clip 16-bit grey to white.
        values = np.asarray(image, dtype=np.float64)
        grey = np.nan_to_num((values - lowest) * (65535 / (highest - lowest or 1.0)) / 257)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[values == transparent] = 255
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")  # a copy
