"""What hostile files are made of: bytes as no usual program writes them, and drawings."""

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from conftest import draw
from PIL import Image, ImageDraw

Drawing = tuple[str, str]  # colour and shape

RED, LIME = ("red", "disc"), ("lime", "square")
BLUE, YELLOW = ("blue", "disc"), ("yellow", "square")
DAMAGED = "not a readable image"


@dataclass(frozen=True)
class HostileFile:
    """A file, or what else stands in a folder, and what must become of it.

    Attributes:
        name: Its path in the folder.
        content: Its bytes, or what makes it at a path.
        shows: What is drawn on it and must be in its caption; None where that can't be told.
        image: How it looks, upright and on white; None where that isn't checked.
        reason: What the reason of its failure holds; "" for an image that must be captioned.
        difference: Mean difference from ``image`` that its format may make, in levels of 255.
    """

    name: str
    content: bytes | Callable[[Path], object]
    shows: Drawing | None = None
    image: Image.Image | None = None
    reason: str = ""
    difference: float = 3.0

    def write(self, folder: Path) -> None:
        """Make it."""
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)


def picture(shows: Drawing, width: int = 96, height: int = 64) -> Image.Image:
    """Return a drawing with a black mark in its upper left corner, so that a turned one differs."""
    image = draw(*shows, width, height)
    side = max(1, min(width, height) // 8)
    ImageDraw.Draw(image).rectangle((0, 0, side - 1, side - 1), fill="black")
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the content of an image file, of a format that Pillow writes, or "HEIF"."""
    file = io.BytesIO()
    if kind == "HEIF":
        frames = pillow_heif.from_pillow(image)
        for frame in options.pop("append_images", ()):
            frames.add_from_pillow(frame)
        frames.save(file, **options)
    else:
        image.save(file, kind, **options)
    return file.getvalue()


def of_picture(
    name: str,
    kind: str,
    shows: Drawing,
    mode: str = "RGB",
    difference: float = 3.0,
    **options: Any,
) -> HostileFile:
    """Return a file that Pillow writes, whose colours can be checked."""
    image = picture(shows)
    content = encoded(image.convert(mode), kind, **options)
    return HostileFile(name, content, shows, image, difference=difference)


def grey(name: str, content: bytes, image: Image.Image | None = None) -> HostileFile:
    """Return a file without colours: its caption can't be checked, its pixels can."""
    return HostileFile(name, content, image=image or picture(RED).convert("L"))


# --- bytes -----------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
    """Return a chunk of PNG."""
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(
    values: np.ndarray, bits: int, colour_type: int, chunks: Iterable[tuple[bytes, bytes]] = ()
) -> bytes:
    """Return a PNG of pixels (height, width[, channels]), as Pillow can't write it."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return png_file(width, height, bits, colour_type, rows, chunks)


def png_file(
    width: int,
    height: int,
    bits: int,
    colour_type: int,
    rows: bytes,
    chunks: Iterable[tuple[bytes, bytes]] = (),
    interlaced: bool = False,
) -> bytes:
    """Return a PNG that holds what its header says only if ``rows`` do."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def bitmap(image: Image.Image) -> bytes:
    """Return a BMP whose header says which bits are alpha (BITMAPV4HEADER)."""
    rows = np.asarray(image)[::-1].tobytes()
    masks = (0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, *image.size, 1, 32, 3, len(rows), 0, 0, 0, 0)
    head += struct.pack("<IIII", *masks) + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 122 + len(rows), 0, 0, 122) + head + rows


def rle_bitmap(image: Image.Image) -> bytes:
    """Return a BMP of run lengths (BI_RLE8), one pixel a run."""
    palette = np.frombuffer(bytes(image.getpalette()[:24]), np.uint8).reshape(-1, 3)[:, ::-1]
    palette = np.concatenate([palette, np.zeros((len(palette), 1), np.uint8)], 1)
    rows = b""
    for row in np.asarray(image)[::-1]:
        rows += b"".join(bytes((1, value)) for value in row.tolist()) + b"\0\0"
    rows += b"\0\1"
    start = 54 + palette.nbytes
    head = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 8, 1, len(rows), 0, 0, len(palette), 0)
    head += palette.tobytes()
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + rows
