"""A folder of files that people's folders hold, and of those that nobody's should."""

import io
import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import draw
from PIL import Image, PngImagePlugin

RED_DISC, BLUE_SQUARE = "a red disc on white", "a blue square"
ANY = "any caption"

Made = tuple[str, str]  # caption, reason


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # saving as JPEG leaves settings in an image
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    whole = name + content
    return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says that it is huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(content)


def turned(image: Image.Image, orientation: int) -> bytes:
    """A JPEG that is upright only if its EXIF is heeded."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes each
    changed = image.transpose(Image.Transpose(back[orientation])) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(changed, "JPEG", quality=95, exif=exif)


def readable() -> dict[str, tuple[bytes, str]]:
    """Return names, contents and captions of files that hold a picture of a known caption."""
    disc, square = draw("red", "disc"), draw("blue", "square")
    clear = draw("red", "disc").convert("RGBA")
    pixels = np.array(clear)
    pixels[(pixels[..., :3] == 255).all(-1)] = 0  # what was white is black, and transparent
    clear = Image.fromarray(pixels)
    palette = square.convert("P", palette=Image.Palette.ADAPTIVE)
    wide = draw("blue", "square", 3000, 3000)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 200_000, zip=True)
    files = {
        "plain.jpg": (encoded(disc, "JPEG", quality=95), RED_DISC),
        "progressive.jpg": (encoded(disc, "JPEG", quality=95, progressive=True), RED_DISC),
        "cmyk.jpg": (encoded(disc.convert("CMYK"), "JPEG", quality=95), RED_DISC),
        "lossless cmyk.tif": (encoded(disc.convert("CMYK"), "TIFF"), RED_DISC),
        "rgba.png": (encoded(clear, "PNG"), RED_DISC),
        "rgba.webp": (encoded(clear, "WEBP", lossless=True), RED_DISC),
        "rgba.tif": (encoded(clear, "TIFF"), RED_DISC),
        "palette.png": (encoded(palette, "PNG"), BLUE_SQUARE),
        "palette.gif": (encoded(palette, "GIF"), BLUE_SQUARE),
        "palette.bmp": (encoded(palette, "BMP"), BLUE_SQUARE),
        "palette with a transparent colour.png": (
            encoded(palette, "PNG", transparency=palette.getpixel((0, 0))),
            BLUE_SQUARE,
        ),
        "interlaced.png": (encoded(square, "PNG", interlace=1), BLUE_SQUARE),
        "much text.png": (encoded(square, "PNG", pnginfo=text), BLUE_SQUARE),
        "bad colour profile.jpg": (
            encoded(disc, "JPEG", quality=95, icc_profile=b"no profile"),
            RED_DISC,
        ),
        "bad exif.jpg": (encoded(disc, "JPEG", quality=95, exif=b"Exif\0\0MM\0*junk"), RED_DISC),
        "animated.gif": (
            encoded(disc, "GIF", save_all=True, append_images=[square, square]),
            RED_DISC,
        ),
        "animated.webp": (
            encoded(disc, "WEBP", save_all=True, append_images=[square], lossless=True),
            RED_DISC,
        ),
        "animated.png": (encoded(disc, "PNG", save_all=True, append_images=[square]), RED_DISC),
        "pages.tif": (encoded(disc, "TIFF", save_all=True, append_images=[square]), RED_DISC),
        "several.mpo": (b"", ""),
        "a.bmp": (encoded(disc, "BMP"), RED_DISC),
        "a.dib": (encoded(disc, "DIB"), RED_DISC),
        "a.tga": (encoded(disc, "TGA"), RED_DISC),
        "a.ppm": (encoded(disc, "PPM"), RED_DISC),
        "a.ico": (encoded(disc, "ICO"), RED_DISC),
        "a.jp2": (encoded(disc, "JPEG2000"), RED_DISC),
        "a.avif": (encoded(disc, "AVIF", quality=90), RED_DISC),
        "a.heic": (encoded(disc, "HEIF", quality=90), RED_DISC),
        "lzw.tiff": (encoded(disc, "TIFF", compression="tiff_lzw"), RED_DISC),
        "9 megapixels.jpg": (encoded(wide, "JPEG"), BLUE_SQUARE),
        "a PNG by another name.jpg": (encoded(disc, "PNG"), RED_DISC),
        "a JPEG by another name.gif": (encoded(disc, "JPEG", quality=95), RED_DISC),
        "bytes behind the end.png": (encoded(disc, "PNG") + b"PK\3\4" * 99, RED_DISC),
    }
    del files["several.mpo"]
    for orientation in range(1, 9):
        files[f"turned {orientation}.jpg"] = turned(disc, orientation), RED_DISC
    return files


def odd() -> dict[str, bytes]:
    """Return files of which any caption will do."""
    disc = draw("red", "disc")
    grey = np.array(disc.convert("L"))
    return {
        "grey.png": encoded(disc.convert("L"), "PNG"),
        "grey and alpha.png": encoded(disc.convert("LA"), "PNG"),
        "1 bit.png": encoded(disc.convert("1"), "PNG"),
        "1 bit.pbm": encoded(disc.convert("1"), "PPM"),
        "16 bits.png": encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "16 bits.tif": encoded(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"),
        "floats.tif": encoded(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "not a number.tif": encoded(Image.fromarray(np.full((20, 20), np.nan, np.float32)), "TIFF"),
        "1 pixel.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "1 pixel high.png": encoded(Image.new("RGB", (5000, 1), "red"), "PNG"),
        "1 pixel wide.jpg": encoded(Image.new("RGB", (1, 5000), "red"), "JPEG"),
        "lab.tif": encoded(Image.new("LAB", (32, 32)), "TIFF"),
        "ycbcr.tif": encoded(disc.convert("YCbCr"), "TIFF"),
    }


def unreadable() -> dict[str, tuple[bytes, str]]:
    """Return files that can't be captioned, and a part of the reason."""
    disc = draw("red", "disc", 300, 300)
    jpeg, png, webp = (encoded(disc, kind) for kind in ("JPEG", "PNG", "WEBP"))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", png)
    wrong_sum = bytearray(png)
    wrong_sum[png.index(b"IDAT") + 20] ^= 255
    return {
        "empty.jpg": (b"", "no known format"),
        "empty.heic": (b"", "no known format"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half.png": (png[: len(png) // 2], ""),
        "half.webp": (webp[: len(webp) // 2], ""),
        "a few bytes.jpg": (jpeg[:10], ""),
        "header alone.png": (png[:33], ""),
        "changed on the disk.png": (bytes(wrong_sum), ""),
        "bomb.png": (bomb(9_000, 9_000), "81.0 megapixels are too many"),
        "larger bomb.png": (bomb(60_000, 60_000), "more pixels than Pillow reads"),
        "page.png": (b"<!doctype html><title>404</title>", "no known format"),
        "archive.gif": (archive.getvalue(), "no known format"),
        "words.jpg": ("déjà vu".encode() * 99, "no known format"),
        "zeros.jpg": (bytes(10_000), ""),
        "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no known format"),
        "document.tif": (b"%PDF-1.7\n1 0 obj", "no known format"),
        "script.eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known"),
        "broken.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), ""),
        "broken.avif": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(99), ""),
    }


def odd_names() -> dict[str, str]:
    """Return names that break programs, and the caption of what they hold."""
    names = [
        *("-rf.png", "--output.png", "a\nb.png", "a\tb.png", "'quoted'.png", '"double".png'),
        *(
            "a;b|c&d.png",
            "$(id).png",
            "`id`.png",
            "*.png",
            "%s%n.png",
        ),
        *("<script>alert(1)<_script>.png", "&amp;.png", "é.png", "e\u0301.png", "猫 😺.png"),
        *("\u202egnp.exe.png", "a b .png", " .png", "x" * 246 + ".png", "{{7*7}}.png", "\\.png"),
        os.fsdecode(b"caf\xe9.png"),
    ]
    return {f"names/{name}": RED_DISC for name in names}


def make_hostile_folder(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Make the folder; return captions by name, and parts of reasons by name."""
    captions: dict[str, str] = {}
    reasons: dict[str, str] = {}

    def put(name: str, content: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    for name, (content, caption) in readable().items():
        put(name, content)
        captions[name] = caption
    for name, content in odd().items():
        put(name, content)
        captions[name] = ANY
    picture = encoded(draw("red", "disc"), "PNG")
    for name, caption in odd_names().items():
        put(name, picture)
        captions[name] = caption
    for name, (content, reason) in unreadable().items():
        put(name, content)
        reasons[name] = reason
    for name, (make, reason) in special().items():
        make(folder / name)
        if reason is not None:
            reasons[name] = reason
    return captions, reasons


def special() -> dict[str, tuple[Callable[[Path], object], str | None]]:
    """Return what isn't a file; None for what is passed over."""

    def listen(path: Path) -> None:
        # Names of sockets are short: bind from within the folder.
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            with socket.socket(socket.AF_UNIX) as own:
                own.bind(path.name)
        finally:
            os.chdir(before)

    def lock(path: Path) -> None:
        path.write_bytes(b"secret")
        path.chmod(0)

    found: dict[str, tuple[Callable[[Path], object], str | None]] = {
        "pipe.jpg": (os.mkfifo, "a pipe, device or socket"),
        "socket.jpg": (listen, ""),
        "nowhere.jpg": (lambda path: path.symlink_to("nothing"), "no such file"),
        "itself.jpg": (lambda path: path.symlink_to(path.name), ""),
        "folder.jpg": (lambda path: path.mkdir(), None),
        "round": (lambda path: path.symlink_to(path.parent), None),
    }
    if os.geteuid():  # root may read everything
        found["locked.jpg"] = lock, "Permission denied"
    return found
