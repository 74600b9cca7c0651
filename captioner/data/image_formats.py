"""Image formats: which are read, and what a file is by its first bytes."""

import contextlib
import functools
import io
import os
import struct
from typing import BinaryIO

from PIL import IcoImagePlugin, Image, JpegImagePlugin, UnidentifiedImageError

# Pillow's names of the formats that it reads here. It knows 40 more, some of which run other
# programs. JPEG includes MPO, several JPEGs in one file.
FORMATS = (
    *("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF"),
    "TGA",  # last: it has no mark to be known by
)
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".ico", ".tga", ".heic", ".heif", ".hif"),
}
START_BYTES = 1024  # of a file, that tell what it is
ICO_MARK = b"\0\0\1\0"
MOST_ICON_PIXELS = 1 << 20
PNG_MARK = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"}
# What HEIF files call themselves: images coded by HEVC, and any images; and what AVIF files do.
HEIF_BRANDS = {
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"),
}
AVIF_BRANDS = {b"avif", b"avis"}
FOREIGN = {  # what files begin with that are often taken for images, in lower case
    b"<!doctype html": "a web page, HTML",
    b"<html": "a web page, HTML",
    b"<svg": "a drawing without pixels, SVG",
    b"%pdf": "a document, PDF",
    b"pk\3\4": "an archive, ZIP",
    b"version https://git-lfs": "a pointer to a file in Git LFS; git lfs pull fetches it",
}


def open_image(file: BinaryIO) -> Image.Image:
    """Return Pillow's image of a file, its header read; not decoded but for icons.

    Raises:
        ValueError: It is none of the formats that are read; the message tells what it may be.
        Exception: It is damaged. Pillow's readers raise almost anything.
    """
    file.seek(0)
    start = file.read(START_BYTES)
    if start.startswith(ICO_MARK):
        _check_icon(file)
    if _is_heif(start):
        return _open_heif(file)
    try:
        image = _open_known(file, start)
    except ValueError:
        if not start.startswith(PNG_MARK):
            raise
        image = _open_known(pixels_of_png(file), start)
    if image.format != "MPO":
        return image
    file.seek(0)
    return JpegImagePlugin.JpegImageFile(file)  # the first of its images


def _open_known(file: BinaryIO, start: bytes) -> Image.Image:
    file.seek(0)
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise ValueError(_guess(start)) from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this Pillow reads: some are missing from older ones."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_icon(file: BinaryIO) -> None:
    """Refuse a file that calls itself an icon and holds a large image: opening decodes it."""
    file.seek(0)
    file.seek(IcoImagePlugin.IcoFile(file).entry[0].offset)
    header = file.read(24)
    is_png = header.startswith(PNG_MARK)
    width, height = struct.unpack(*((">II", header[16:]) if is_png else ("<ii", header[4:12])))
    if width * abs(height) > MOST_ICON_PIXELS:
        raise ValueError(f"an icon of {width} x {abs(height)} pixels")


def _is_heif(start: bytes) -> bool:
    """Tell by a file's first bytes whether it is HEIF, other than AVIF."""
    if start[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(start[:4], "big"), len(start))
    brands = {start[8:12], *(start[place : place + 4] for place in range(16, end, 4))}
    return bool(brands & HEIF_BRANDS) and not brands & AVIF_BRANDS


def _open_heif(file: BinaryIO) -> Image.Image:
    """Open HEIF by pillow-heif's class alone: Pillow's list of formats stays as it is."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ValueError("HEIC is read by an extra: pip install 'captioner[heic]'") from None
    file.seek(0)
    return HeifImageFile(file)


def pixels_of_png(file: BinaryIO) -> BinaryIO:
    """Return a PNG of nothing but the pixels of another, and of how they are turned.

    Pillow refuses one with long texts or colour profiles, or with damage in what is beside its
    pixels.
    """
    pixels = io.BytesIO()
    pixels.write(PNG_MARK)
    file.seek(len(PNG_MARK))
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name in PNG_PIXELS:
            pixels.write(head + file.read(length + 4))  # and its checksum
        else:
            file.seek(length + 4, os.SEEK_CUR)
    return pixels


def _guess(start: bytes) -> str:
    """Return what a file may be that isn't read, by its first bytes."""
    if not start:
        return "an empty file"
    for name in _formats():
        accepts = Image.OPEN[name][1]
        with contextlib.suppress(Exception):  # too few bytes
            if accepts and accepts(start[:16]) is True:
                return f"a damaged {name} file, or one of a rare kind"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, kind in FOREIGN.items():
        if text.startswith(mark):
            return kind
    return FOREIGN[b"<svg"] if b"<svg" in text else "no known format"
