"""Files that folders hold and that readers of images stumble over; ``hostile_files`` makes all."""

import os
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import hostile_images
import numpy as np
from hostile_bytes import (
    BLUE,
    DAMAGED,
    LIME,
    RED,
    YELLOW,
    HostileFile,
    encoded,
    of_picture,
    picture,
    png_file,
)
from PIL import Image

NO_FORMAT = "no known format"


def hostile_files() -> list[HostileFile]:
    """Make all of them; their names differ."""
    groups = (
        *(*hostile_images.GROUPS, strips, huge, bombs, lying_headers, cut_off, false_names),
        *(foreign, odd_names, no_regular_files),
    )
    files = [file for group in groups for file in group()]
    assert len({file.name for file in files}) == len(files)
    return files


# --- sizes ------------------------------------------------------------------------------------


def strips() -> Iterable[HostileFile]:
    for width, height in ((1, 1), (1, 5000), (5000, 1), (3, 65535)):
        image = Image.new("RGB", (width, height), "red")
        for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("BMP", "bmp")):
            if kind == "JPEG" and max(width, height) > 65_500:  # the most it can have
                continue
            yield HostileFile(f"{width} x {height}.{suffix}", encoded(image, kind), image=image)
    dot = Image.new("RGB", (1, 1), "red")
    for kind, suffix in (("GIF", "gif"), ("WEBP", "webp"), ("TIFF", "tif"), ("TGA", "tga")):
        yield HostileFile(f"1 x 1.{suffix}", encoded(dot, kind), image=dot, difference=6)
    yield HostileFile("1 x 1.jp2", encoded(dot, "JPEG2000"), image=dot)
    yield HostileFile("1 x 1.avif", encoded(dot, "AVIF"), image=dot, difference=6)


def huge() -> Iterable[HostileFile]:
    """These are read, in bounded memory."""
    yield HostileFile("huge.png", encoded(picture(YELLOW, 7000, 7000), "PNG"), YELLOW)
    yield HostileFile("huge.jpg", encoded(picture(LIME, 12_000, 9000), "JPEG"), LIME)
    large = picture(LIME).quantize(8).resize((6000, 4000))
    yield HostileFile("huge.gif", encoded(large, "GIF"), LIME)
    content = encoded(picture(RED, 5000, 5000), "TIFF", compression="tiff_lzw")
    yield HostileFile("huge.tif", content, RED)
    yield HostileFile("huge.heic", encoded(picture(BLUE, 2400, 1800), "HEIF"), BLUE)


def bombs() -> Iterable[HostileFile]:
    """These are refused before they are decoded."""
    bomb = "more pixels than Pillow reads"
    many = "megapixels are too many"
    zeros = bytes(30_000 * (30_000 // 8 + 1))
    yield HostileFile("bomb.png", png_file(30_000, 30_000, 1, 0, zeros), reason=bomb)
    yield HostileFile("bomb of 80 MP.png", png_file(9000, 9000, 1, 0, zeros), reason=many)
    content = png_file(2**31 - 1, 2**31 - 1, 16, 6, b"")
    yield HostileFile("bomb, only a header.png", content, reason=bomb)
    progressive = encoded(Image.new("L", (9000, 9000)), "JPEG", progressive=True)
    yield HostileFile("bomb, progressive.jpg", progressive, reason=many)
    small = encoded(picture(RED).quantize(8), "GIF")
    screen = small.replace(struct.pack("<HH", 96, 64), b"\xff\xff\xff\xff", 1)
    yield HostileFile("bomb.gif", screen, reason=bomb)
    webp = b"RIFF\x1a\0\0\0WEBPVP8L\r\0\0\0/" + struct.pack("<I", 16_382 | 16_382 << 14) + bytes(9)
    yield HostileFile("bomb.webp", webp, reason=bomb)
    yield HostileFile("bomb.ppm", b"P6 60000 60000 255\n" + bytes(99), reason=bomb)
    targa = bytes([0, 0, 2, *bytes(9)]) + b"\xff\xff\xff\xff\x18\0"
    yield HostileFile("bomb.tga", targa, reason=bomb)
    head = struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0)
    yield HostileFile("bomb.bmp", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head, reason=bomb)


def lying_headers() -> Iterable[HostileFile]:
    """Small by their header, large by what is in them; and the other way round."""
    image = Image.new("RGB", (1024, 1024), "red")
    heic, jp2 = encoded(image, "HEIF"), encoded(image, "JPEG2000")
    for name, side in (("larger", 64), ("smaller", 7000)):
        of_side = struct.pack(">II", side, side)
        lie = replaced(heic, heic.index(b"ispe") + 8, of_side)
        yield HostileFile(f"{name} than it says.heic", lie, reason=DAMAGED)
        lie = replaced(jp2, jp2.index(b"ihdr") + 4, of_side)
        yield HostileFile(f"{name} than it says.jp2", lie, reason=DAMAGED)
    lie = replaced(heic, heic.index(b"ispe") + 8, struct.pack(">II", 30_000, 30_000))
    yield HostileFile("bomb.heic", lie, reason="900.0 megapixels are too many")
    image_and_tile = struct.pack(">IIIIII", 60_000, 60_000, 0, 0, 60_000, 60_000)
    lie = replaced(jp2, jp2.index(b"\xff\x51") + 6, image_and_tile)
    yield HostileFile("bomb.jp2", lie, reason=DAMAGED)
    avif = encoded(picture(RED), "AVIF")  # these are scaled to what they say
    for name, side in (("larger", 16), ("smaller", 3000)):
        lie = replaced(avif, avif.index(b"ispe") + 8, struct.pack(">II", side, side))
        yield HostileFile(f"{name} than it says.avif", lie)
    lie = replaced(avif, avif.index(b"ispe") + 8, struct.pack(">II", 30_000, 30_000))
    yield HostileFile("bomb.avif", lie, reason="a damaged AVIF file")
    plain = encoded(picture(RED), "JPEG")
    lie = replaced(plain, plain.index(b"\xff\xc0") + 5, struct.pack(">HH", 7000, 7000))
    yield HostileFile("smaller than it says.jpg", lie)
    big = encoded(Image.new("RGB", (2048, 2048)), "PNG")
    directory = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(big), 22)
    yield HostileFile("larger than it says.ico", directory + big, reason="an icon of 2048 x 2048")


def replaced(content: bytes, start: int, part: bytes) -> bytes:
    """Return a content with a part of it replaced by another as long."""
    return content[:start] + part + content[start + len(part) :]


def cut_off() -> Iterable[HostileFile]:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    contents = {
        "jpg": encoded(noise, "JPEG"),
        "progressive.jpg": encoded(noise, "JPEG", progressive=True),
        "png": encoded(noise, "PNG"),
        "webp": encoded(noise, "WEBP"),
        "lossless.webp": encoded(noise, "WEBP", lossless=True),
        "gif": encoded(noise, "GIF"),
        "tif": encoded(noise, "TIFF"),
        "lzw.tif": encoded(noise, "TIFF", compression="tiff_lzw"),
        "bmp": encoded(noise, "BMP"),
        "tga": encoded(noise, "TGA"),
        "ppm": encoded(noise, "PPM"),
        "ico": encoded(noise, "ICO", sizes=[(64, 64)]),
        "jp2": encoded(noise, "JPEG2000"),
        "avif": encoded(noise, "AVIF"),
        "heic": encoded(noise, "HEIF"),
    }
    for suffix, content in contents.items():
        for part in (2, 12, len(content) // 4, len(content) * 3 // 4, len(content) - 40):
            yield HostileFile(f"cut after {part}.{suffix}", content[:part], reason=DAMAGED)
    for suffix, reason in (("jpg", ""), ("tif", ""), ("png", DAMAGED), ("lzw.tif", DAMAGED)):
        content = contents[suffix]
        content = replaced(content, len(content) // 2, bytes(200))
        yield HostileFile(f"a hole within.{suffix}", content, reason=reason)


# --- not what the name says -------------------------------------------------------------------


def false_names() -> Iterable[HostileFile]:
    for name, kind in (
        *(("PNG.jpg", "PNG"), ("JPEG.png", "JPEG"), ("WebP.jpg", "WEBP"), ("GIF.jpeg", "GIF")),
        *(("TIFF.gif", "TIFF"), ("BMP.webp", "BMP"), ("JPEG.heic", "JPEG"), ("HEIC.jpg", "HEIF")),
        *(("AVIF.png", "AVIF"), ("JPEG 2000.jpg", "JPEG2000"), ("PPM.tga", "PPM")),
    ):
        yield of_picture(f"named wrong, {name}", kind, RED, difference=6)
    heic = encoded(picture(BLUE), "HEIF")
    other = heic.replace(b"ftypheic", b"ftypmif1", 1)
    yield HostileFile("another brand.heic", other, BLUE, picture(BLUE))
    other = heic.replace(b"ftypheic", b"ftypMiHB", 1)
    yield HostileFile("a brand of its own.heic", other, BLUE, picture(BLUE))
    avif = encoded(picture(BLUE), "AVIF")
    other = avif.replace(b"ftypavif", b"ftypmif1", 1)
    yield HostileFile("another brand.avif", other, BLUE, picture(BLUE))


def foreign() -> Iterable[HostileFile]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'
    xml = b'<?xml version="1.0"?>\n<!-- a comment -->\n'
    contents = {
        "empty.jpg": (b"", "empty"),
        "a text.jpg": (b"Dear reader,\nthis is no image.\n", NO_FORMAT),
        "a page.png": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "HTML"),
        "a page, later.jpg": (b"\n\n  <HTML><head>", "HTML"),
        "an archive.gif": (b"PK\3\4\x14\0\0\0" + bytes(99), "ZIP"),
        "a drawing.png": (svg, "SVG"),
        "a drawing, in XML.png": (xml + svg, "SVG"),
        "a document.jpg": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "PDF"),
        "PostScript.jpg": (encoded(picture(RED), "EPS"), NO_FORMAT),
        "a film.heic": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(99), NO_FORMAT),
        "a program.jpg": (b"\x7fELF\2\1\1" + bytes(99), NO_FORMAT),
        "zeros.png": (bytes(4096), NO_FORMAT),
        "zeros.tga": (bytes(4096), NO_FORMAT),
        "ones.jpg": (b"\xff" * 4096, DAMAGED),
        "a line break.jpg": (b"\n", NO_FORMAT),
        "PCX.png": (encoded(picture(RED), "PCX"), NO_FORMAT),
        "a pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    }
    for name, (content, reason) in contents.items():
        yield HostileFile(name, content, reason=reason)
    rng = np.random.default_rng(1)
    for number in range(4):
        yield HostileFile(f"noise {number}.jpg", rng.bytes(5000), reason=DAMAGED)


# --- names and other entries of a folder ------------------------------------------------------


def odd_names() -> Iterable[HostileFile]:
    # fmt: off
    names = (
        "two\nlines", "a return\r", "a tab\t", "\x1b[31mred", "bell\x07", "-rf", "--help", "-", " ",
        "'single'", '"double"', "`touch x`", "$(touch x)", "; rm x", "a & b", "*", "?", "[a]", "~",
        "{a,b}", "%s%n", "%00", "a\\b", "a:b", "C:", "|", "#", "!", "=1+1", "@sum", "CON", "null",
        "😺", "👩‍👩‍👧", "e\u0301", "\u00e9", "Z\u0351\u036b\u0343a\u0328lgo", "\u202egnp", "\u200b",
        "<b>bold<|b>", "<img src=x onerror=alert(1)>", "&amp;", "&lt;script&gt;", "NaN", "0",
        "a" * 246, "é" * 123, " leading", "trailing ", "x.jpg", "x..", "\ufeffmark", "猫", "\u2028",
        "true", "مرحبا",
    )
    # fmt: on
    content = encoded(picture(YELLOW), "PNG")
    for name in names:
        yield HostileFile(f"{name}.png", content, YELLOW)
    for raw in (b"caf\xe9.png", b"\xff\xfe\x80.png", b"half \xf0\x9f\x98.png"):
        yield HostileFile(os.fsdecode(raw), content, YELLOW)
    for path in ("UPPER.PNG", "\n/\n/\n.png", "-rf folder/--output.png", "a folder.jpg/x.png"):
        yield HostileFile(path, content, YELLOW)


def no_regular_files() -> Iterable[HostileFile]:
    content = encoded(picture(RED), "PNG")
    special = "a pipe, device or socket, not a regular file"
    if hasattr(os, "mkfifo"):
        yield HostileFile("a pipe.jpg", os.mkfifo, reason=special)
        yield HostileFile("a socket.jpg", _bind, reason=DAMAGED)
    yield HostileFile("a link to a device.jpg", _link("/dev/zero"), reason=special)
    yield HostileFile("a link to nothing.jpg", _link("nothing.jpg"), reason="no such file")
    yield HostileFile("a link to itself.jpg", _link("a link to itself.jpg"), reason="links")
    yield HostileFile("a link round 1.jpg", _link("a link round 2.jpg"), reason="links")
    yield HostileFile("a link round 2.jpg", _link("a link round 1.jpg"), reason="links")
    yield HostileFile("a link to an image.jpg", _link("an image for it.png"), RED, picture(RED))
    yield HostileFile("an image for it.png", content, RED, picture(RED))
    if hasattr(os, "geteuid") and os.geteuid():  # root may read everything
        yield HostileFile("forbidden.png", _forbidden(content), reason="Permission denied")


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


def _link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def _forbidden(content: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.write_bytes(content)
        path.chmod(0)

    return write
