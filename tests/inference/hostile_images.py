"""Images of unusual kinds, all of which must be read, and a few damaged ones that can't be."""

import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from conftest import draw
from hostile_bytes import (
    BLUE,
    DAMAGED,
    LIME,
    RED,
    YELLOW,
    Drawing,
    HostileFile,
    bitmap,
    chunk,
    encoded,
    grey,
    of_picture,
    picture,
    png,
    png_file,
    rle_bitmap,
)
from PIL import Image, ImageCms, ImageOps

ORIENTATION = 0x0112

# --- transparency -----------------------------------------------------------------------------


def on_transparent(shows: Drawing, hidden: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """Return a picture whose white is transparent; there it hides another colour."""
    image = picture(shows)
    is_white = (np.asarray(image) == 255).all(-1, keepdims=True)
    colours = np.where(is_white, np.array(hidden), np.asarray(image))
    alpha = np.where(is_white, 0, 255)
    return Image.fromarray(np.concatenate([colours, alpha], -1).astype(np.uint8))


def alpha() -> Iterable[HostileFile]:
    image = on_transparent(BLUE, (255, 0, 0))
    for kind, suffix in (
        *(("PNG", "png"), ("TIFF", "tif"), ("TGA", "tga"), ("JPEG2000", "jp2"), ("ICO", "ico")),
        *(("AVIF", "avif"), ("HEIF", "heic")),
    ):
        options = {"ICO": {"sizes": [image.size]}, "HEIF": {"quality": -1}}.get(kind, {})
        content = encoded(image, kind, **options)
        yield HostileFile(f"alpha.{suffix}", content, BLUE, picture(BLUE), difference=5)
    yield HostileFile("alpha.bmp", bitmap(image), BLUE, picture(BLUE))
    content = encoded(image, "WEBP", lossless=True)
    yield HostileFile("alpha.webp", content, BLUE, picture(BLUE))
    yield grey("alpha grey.png", encoded(image.convert("LA"), "PNG"), picture(BLUE).convert("L"))
    invisible = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    white = Image.new("RGB", (64, 64), "white")
    yield HostileFile("alpha, nothing else.png", encoded(invisible, "PNG"), image=white)
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    middle = Image.new("RGB", (64, 64), (127, 127, 127))
    yield HostileFile("alpha, half.png", encoded(half, "PNG"), image=middle)
    colour = Image.fromarray(np.asarray(on_transparent(LIME, (1, 2, 3)))[..., :3])
    content = encoded(colour, "PNG", transparency=(1, 2, 3))
    yield HostileFile("a transparent colour.png", content, LIME, picture(LIME))
    level = np.asarray(picture(LIME).convert("L"))
    level = np.where(level == 255, 7, level).astype(np.uint8)
    image = picture(LIME).convert("L")
    content = encoded(Image.fromarray(level), "PNG", transparency=7)
    yield grey("a transparent level.png", content, image)
    level = png(level.astype(">u2") * 257, 16, 0, [(b"tRNS", struct.pack(">H", 7 * 257))])
    yield grey("a transparent level of 16 bits.png", level, image)


def palettes() -> Iterable[HostileFile]:
    yield of_picture("palette.png", "PNG", YELLOW, "P")
    yield of_picture("palette.tif", "TIFF", LIME, "P")
    yield of_picture("palette.bmp", "BMP", RED, "P")
    yield of_picture("palette.tga", "TGA", BLUE, "P")
    image = picture(YELLOW)
    content = encoded(image.quantize(4), "PNG", bits=2)
    yield HostileFile("palette of 2 bits.png", content, YELLOW, image)
    indices = image.quantize(8, dither=Image.Dither.NONE)
    white = indices.getpixel((image.width - 1, 0))
    hidden = indices.copy()
    colours = hidden.getpalette()
    colours[3 * white : 3 * white + 3] = (255, 0, 0)
    hidden.putpalette(colours)
    for name, kind in (("png", "PNG"), ("gif", "GIF")):
        content = encoded(hidden, kind, transparency=white)
        yield HostileFile(f"palette, transparent.{name}", content, YELLOW, image)
    levels = bytes(0 if index == white else 255 for index in range(8))
    content = encoded(hidden, "PNG", transparency=levels)
    yield HostileFile("palette, levels of alpha.png", content, YELLOW, image)
    content = encoded(on_transparent(RED).quantize(16), "PNG")
    yield HostileFile("palette of RGBA.png", content, RED, picture(RED))
    short = png(np.full((8, 8), 200, np.uint8), 8, 3, [(b"PLTE", bytes(9))])
    yield HostileFile("palette too short.png", short)
    with_alpha = np.full((256, 4), 255, np.uint8)
    colours = np.array(indices.getpalette(), np.uint8).reshape(-1, 3)
    with_alpha[: len(colours), :3] = colours[:, ::-1]  # blue first
    with_alpha[white] = (0, 0, 255, 0)
    head = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 256, 32, 0, 0, 96, 64, 8, 0x20)
    content = head + with_alpha.tobytes() + indices.tobytes()
    yield HostileFile("palette with alpha.tga", content, YELLOW, image)


# --- depth ------------------------------------------------------------------------------------


def depths() -> Iterable[HostileFile]:
    colours = np.asarray(picture(BLUE)).astype(">u2") * 257
    level = np.asarray(picture(RED).convert("L"))
    deep = Image.fromarray(level.astype(np.uint16) * 257)
    yield HostileFile("16 bits RGB.png", png(colours, 16, 2), BLUE, picture(BLUE))
    solid = np.full((*level.shape, 1), 65535, ">u2")
    with_alpha = png(np.concatenate([colours, solid], -1), 16, 6)
    yield HostileFile("16 bits RGBA.png", with_alpha, BLUE, picture(BLUE))
    yield grey("16 bits grey.png", encoded(deep, "PNG"))
    grey_alpha = np.stack([np.asarray(deep).astype(">u2"), solid[..., 0]], -1)
    yield grey("16 bits grey and alpha.png", png(grey_alpha, 16, 4))
    yield grey("16 bits grey.tif", encoded(deep, "TIFF"))
    yield grey("16 bits grey.jp2", encoded(deep, "JPEG2000"))
    yield grey("16 bits grey.pgm", encoded(deep, "PPM"))
    yield grey("32 bits grey.tif", encoded(deep.convert("I"), "TIFF"))
    signed = Image.fromarray((level.astype(np.int32) - 128) * (1 << 24))
    yield grey("32 bits signed.tif", encoded(signed, "TIFF"))
    for bits in (1, 2, 4):
        image = ImageOps.posterize(picture(RED).convert("L"), bits)
        codes = np.asarray(image) >> (8 - bits)
        packed = np.packbits(np.unpackbits(codes[..., None], 2)[..., 8 - bits :].reshape(64, -1), 1)
        seen = Image.fromarray((codes * (255 // (2**bits - 1))).astype(np.uint8))
        content = png_file(96, 64, bits, 0, b"".join(b"\0" + row.tobytes() for row in packed))
        yield grey(f"{bits} bits grey.png", content, seen)
    bilevel = picture(RED).convert("1", dither=Image.Dither.NONE)
    yield grey("1 bit.tif", encoded(bilevel, "TIFF", compression="group4"), bilevel)
    yield grey("1 bit.bmp", encoded(bilevel, "BMP"), bilevel)
    yield grey("grey.jpg", encoded(picture(RED).convert("L"), "JPEG"))
    colours16 = b"P6 96 64 65535\n" + colours.tobytes()
    yield HostileFile("16 bits RGB.ppm", colours16, BLUE, picture(BLUE))


def floats() -> Iterable[HostileFile]:
    level = np.asarray(picture(RED).convert("L")).astype(np.float32)
    low, high = level.min(), level.max()
    stretched = Image.fromarray(((level - low) * (255 / (high - low))).astype(np.uint8))

    def tiff(values: np.ndarray) -> bytes:
        return encoded(Image.fromarray(values.astype(np.float32)), "TIFF")

    yield grey("float, 0 to 1.tif", tiff(level / 255), stretched)
    yield grey("float, large.tif", tiff(level * 1e30), stretched)
    for name, value in (("NaN", np.nan), ("infinite", np.inf), ("minus infinite", -np.inf)):
        holes = level.copy()
        holes[0, 0] = value
        yield grey(f"float, {name} first.tif", tiff(holes), stretched)
        holes = level.copy()
        holes[20, 30] = value
        yield grey(f"float, {name} within.tif", tiff(holes), stretched)
    yield HostileFile("float, all NaN.tif", tiff(np.full((64, 64), np.nan)))
    yield HostileFile("float, all the same.tif", tiff(np.full((64, 64), 3.5)))


# --- EXIF -------------------------------------------------------------------------------------

TURNS = {  # what makes the pixels in the file of the upright image
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS[orientation]
    return image if turn is None else image.transpose(turn)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def orientations() -> Iterable[HostileFile]:
    for number in TURNS:
        yield turned_file(f"turned {number}.jpg", "JPEG", number)
    yield turned_file("turned, progressive.jpg", "JPEG", 8, progressive=True)
    for kind, name in (("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif"), ("AVIF", "avif")):
        yield turned_file(f"turned.{name}", kind, 6)
        yield turned_file(f"mirrored.{name}", kind, 7)
    packet = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
        xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description
        xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""
    content = encoded(turned(picture(LIME), 6), "JPEG", xmp=packet)
    yield HostileFile("turned by XMP.jpg", content, LIME, picture(LIME))
    # What turns HEIC is a mark of its own, which its writer makes of EXIF's as well.
    for number in TURNS:
        yield turned_file(f"turned {number}.heic", "HEIF", number)
    # An Exif object escapes the writer's notice: this has EXIF's mark alone, which turns nothing.
    yield of_picture("turned by EXIF alone.heic", "HEIF", LIME, exif=exif(6))


def turned_file(name: str, kind: str, orientation: int, **options: Any) -> HostileFile:
    shows = (RED, LIME, BLUE, YELLOW)[orientation % 4]
    tags = exif(orientation).tobytes()
    content = encoded(turned(picture(shows), orientation), kind, exif=tags, **options)
    return HostileFile(name, content, shows, picture(shows))


def damaged_exif() -> Iterable[HostileFile]:
    whole = exif(6).tobytes()
    upright = struct.pack("<HHII", ORIENTATION, 3, 1, 1)

    def tags(*entries: bytes, following: int = 0) -> bytes:
        start = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
        return start + b"".join(entries) + struct.pack("<I", following)

    damaged = {
        "junk": b"Exif\0\0" + b"\xa5" * 40,
        "empty": b"Exif\0\0",
        "cut off": whole[:20],
        "beyond the end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
        "65535 entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + upright,
        "orientation 0": tags(struct.pack("<HHII", ORIENTATION, 3, 1, 0)),
        "orientation 9": tags(struct.pack("<HHII", ORIENTATION, 3, 1, 9)),
        "orientation in words": tags(struct.pack("<HHI4s", ORIENTATION, 2, 4, b"up!\0")),
        "orientation of many": tags(struct.pack("<HHII", ORIENTATION, 3, 2, 1 | 1 << 16)),
        "orientation a fraction": tags(struct.pack("<HHII", ORIENTATION, 5, 1, 9999)),
        "no such type": tags(struct.pack("<HHII", ORIENTATION, 77, 1, 1)),
        "4 GB of text": tags(struct.pack("<HHII", 0x010E, 2, 0xFFFFFFFF, 8)),
        "a circle": tags(struct.pack("<HHII", 0x8769, 4, 1, 8), following=8),
        "resolution 1 of 0": tags(
            struct.pack("<HHII", 0x011A, 5, 1, 0x32), struct.pack("<HHII", 0x0128, 3, 1, 2)
        )
        + bytes(40),
    }
    for name, content in damaged.items():
        yield of_picture(f"EXIF, {name}.jpg", "JPEG", RED, exif=content)
    yield of_picture("EXIF, junk.png", "PNG", RED, exif=damaged["junk"])
    yield of_picture("EXIF, junk.webp", "WEBP", RED, exif=damaged["junk"])


# --- several images in a file -----------------------------------------------------------------


def first_frames() -> Iterable[HostileFile]:
    frames = {"save_all": True, "append_images": [draw("red", "square", 96, 64)] * 2}
    for kind, name in (
        *(("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif"), ("AVIF", "avif")),
        *(("MPO", "jpg"), ("HEIF", "heic")),
    ):
        yield of_picture(f"animated.{name}", kind, BLUE, **frames)
    content = encoded(turned(picture(LIME), 6), "MPO", exif=exif(6), **frames)
    yield HostileFile("several, turned.mpo.jpg", content, LIME, picture(LIME))
    sizes = [(16, 16), (64, 64), (32, 32)]
    square = picture(RED, 64, 64)
    yield HostileFile("sizes.ico", encoded(square, "ICO", sizes=sizes), RED, square)
    content = encoded(square, "ICO", sizes=sizes, bitmap_format="bmp")
    yield HostileFile("sizes, bitmaps.ico", content, RED, square)
    indices = picture(YELLOW).quantize(8)
    content = encoded(indices, "GIF", interlace=1)
    yield HostileFile("interlaced.gif", content, YELLOW, picture(YELLOW))
    # A first frame of 96 x 64 in the corner of a screen of 8 x 8.
    small = content.replace(struct.pack("<HH", 96, 64), struct.pack("<HH", 8, 8), 1)
    yield HostileFile("larger than its screen.gif", small, YELLOW, picture(YELLOW))
    yield HostileFile("no frame.gif", b"GIF89a\x08\0\x08\0\0\0\0;", reason=DAMAGED)


# --- formats ----------------------------------------------------------------------------------


def jpegs() -> Iterable[HostileFile]:
    image = picture(LIME)
    plain = encoded(image, "JPEG")
    yield of_picture("progressive.jpg", "JPEG", RED, progressive=True)
    yield of_picture("CMYK, Adobe.jpg", "JPEG", RED, "CMYK")
    yield of_picture("RGB, not YCC.jpg", "JPEG", BLUE, keep_rgb=True)
    yield of_picture("4 to 1.jpg", "JPEG", BLUE, subsampling="4:2:0", quality=30, difference=8)
    yield of_picture("restarts.jpg", "JPEG", BLUE, restart_marker_blocks=1)
    # YCCK, as Photoshop writes it: Y, Cb and Cr of the inks. Pillow inverts all that it saves.
    inks = ImageOps.invert(image).convert("YCbCr")
    bands = [ImageOps.invert(band) for band in inks.split()]
    inks = Image.merge("CMYK", [*bands, Image.new("L", image.size)])
    content = encoded(inks, "JPEG", quality=95, subsampling=0)
    mark = content.index(b"Adobe") + 11
    content = content[:mark] + b"\2" + content[mark + 1 :]
    yield HostileFile("YCCK, Adobe.jpg", content, LIME, image)
    yield HostileFile("more behind it.jpg", plain + b"\0more" * 5000, LIME, image)
    yield HostileFile("two in one.jpg", plain + encoded(picture(RED), "JPEG"), LIME, image)
    yield HostileFile("no end.jpg", plain[:-2], reason="truncated")
    notes = b"".join(b"\xff\xfe\xff\xff" + b"x" * 65533 for _ in range(20))
    yield HostileFile("comments.jpg", plain[:2] + notes + plain[2:], LIME, image)
    frame = plain.index(b"\xff\xc0")
    deep = plain[: frame + 4] + b"\x0c" + plain[frame + 5 :]
    yield HostileFile("12 bits.jpg", deep, reason="a damaged JPEG file, or one of a rare kind")
    lossless = plain[: frame + 1] + b"\xc3" + plain[frame + 2 :]
    yield HostileFile("lossless.jpg", lossless, reason=DAMAGED)
    none = plain[: frame + 5] + bytes(4) + plain[frame + 9 :]
    yield HostileFile("0 x 0.jpg", none, reason=DAMAGED)
    no_tables = plain.replace(b"\xff\xc4", b"\xff\xfe")
    yield HostileFile("no tables.jpg", no_tables)


def pngs() -> Iterable[HostileFile]:
    image = picture(BLUE)
    values = np.asarray(image)
    plain = encoded(image, "PNG")
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    rows = b"".join(
        b"\0" + row.tobytes()
        for top, left, down, right in (*passes, (1, 0, 2, 1))
        for row in values[top::down, left::right]
    )
    yield HostileFile("interlaced.png", png_file(96, 64, 8, 2, rows, (), True), BLUE, image)
    long = b"Comment\0" + b"x" * 3_000_000
    bomb = zlib.compress(bytes(50_000_000), 9)
    extra = {
        "3 MB of text": [(b"tEXt", long)],
        "a text of 50 MB, packed": [(b"zTXt", b"Comment\0\0" + bomb)],
        "a text of 50 MB, packed, in Unicode": [(b"iTXt", b"Comment\0\1\0\0\0" + bomb)],
        "a profile of 50 MB, packed": [(b"iCCP", b"ICC\0\0" + bomb)],
        "80 MB of texts": [(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000)))] * 80,
        "texts that end at once": [(b"tEXt", b""), (b"zTXt", b""), (b"iTXt", b""), (b"iCCP", b"")],
        "a text packed unknown": [(b"zTXt", b"Comment\0\7abc")],
        "a chunk nobody knows": [(b"prVt", b"?" * 999)],
        "gamma 0": [(b"gAMA", bytes(4))],
        "no chromaticities": [(b"cHRM", b"\0")],
    }
    for name, chunks in extra.items():
        yield HostileFile(f"{name}.png", png(values, 8, 2, chunks), BLUE, image)
    behind = chunk(b"zTXt", b"Comment\0\0" + bomb) + plain[-12:]
    yield HostileFile("a text of 50 MB behind it.png", plain[:-12] + behind, BLUE, image)
    yield HostileFile("no end.png", plain[:-12], BLUE, image)
    yield HostileFile("more behind it.png", plain + b"\0more" * 5000, BLUE, image)
    for name, reason in (("IHDR", "PNG"), ("IDAT", ""), ("IEND", "")):
        start = plain.index(name.encode())
        end = start + 4 + struct.unpack(">I", plain[start - 4 : start])[0]
        wrong = plain[:end] + b"\0\0\0\0" + plain[end + 4 :]
        is_read = not reason
        yield HostileFile(
            f"wrong sum of {name}.png",
            wrong,
            BLUE if is_read else None,
            image if is_read else None,
            reason,
        )
    text = chunk(b"tEXt", b"Comment\0wrong", crc=1)
    yield HostileFile("wrong sum of a text.png", plain[:33] + text + plain[33:], BLUE, image)
    yield HostileFile("0 x 0.png", png_file(0, 0, 8, 2, b""), reason=DAMAGED)
    yield HostileFile("no pixels.png", png_file(64, 64, 8, 2, b""), reason="truncated")
    yield HostileFile("no such colours.png", png_file(8, 8, 8, 5, bytes(72)), reason="PNG")
    unknown = png_file(8, 8, 8, 0, b"\x09" * 72)
    yield HostileFile("filters unknown.png", unknown, reason=DAMAGED)


def tiffs() -> Iterable[HostileFile]:
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        content = {"compression": name}
        yield of_picture(f"{name}.tif", "TIFF", RED, **content, difference=6)
    yield of_picture("CMYK.tif", "TIFF", BLUE, "CMYK")
    yield of_picture("YCbCr.tif", "TIFF", BLUE, "YCbCr")
    yield of_picture("large.tif", "TIFF", LIME, big_tiff=True)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(picture(LIME), srgb, lab, outputMode="LAB")
    yield HostileFile("LAB.tif", encoded(image, "TIFF"), LIME, picture(LIME), difference=6)
    colours = np.asarray(picture(BLUE)).astype("<u2") * 257
    tags = {
        256: (4, 1, 96), 257: (4, 1, 64), 258: (3, 3, 200), 259: (3, 1, 1), 262: (3, 1, 2),
        273: (4, 1, 256), 277: (3, 1, 3), 278: (4, 1, 64), 279: (4, 1, colours.nbytes),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in tags.items())
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    head = head.ljust(200, b"\0") + struct.pack("<HHH", 16, 16, 16)
    content = head.ljust(256, b"\0") + colours.tobytes()
    yield HostileFile("16 bits RGB.tif", content, BLUE, picture(BLUE))
    following = 10 + len(entries)
    circle = content[:following] + struct.pack("<I", 8) + content[following + 4 :]
    yield HostileFile("pages in a circle.tif", circle, BLUE, picture(BLUE))
    yield HostileFile("no page.tif", b"II*\0\0\0\0\0", reason="TIFF")


def other_formats() -> Iterable[HostileFile]:
    yield of_picture("lossy.webp", "WEBP", RED, difference=6)
    yield of_picture("lossless.webp", "WEBP", RED, lossless=True)
    yield of_picture("plain.avif", "AVIF", BLUE)
    yield of_picture("plain.heic", "HEIF", BLUE)
    yield of_picture("plain.heif", "HEIF", YELLOW, chroma=444)
    yield of_picture("tiles.heic", "HEIF", YELLOW, tile_size=64)
    yield of_picture("plain.jp2", "JPEG2000", YELLOW)
    lossy = {"quality_layers": [20], "irreversible": True}
    yield of_picture("lossy.jp2", "JPEG2000", YELLOW, difference=8, **lossy)
    yield of_picture("plain.bmp", "BMP", LIME)
    yield of_picture("plain.dib", "DIB", LIME)
    yield of_picture("plain.ppm", "PPM", LIME)
    yield of_picture("plain.tga", "TGA", RED)
    yield of_picture("packed.tga", "TGA", RED, compression="tga_rle")
    image = picture(RED)
    grey_image = image.convert("L")
    yield grey("plain.pgm", encoded(grey_image, "PPM"))
    bilevel = image.convert("1", dither=Image.Dither.NONE)
    yield grey("plain.pbm", encoded(bilevel, "PPM"), bilevel)
    words = " ".join(str(value) for value in np.asarray(image).ravel())
    content = f"P3 # a comment\n96 64 # another\n255\n{words}\n".encode()
    yield HostileFile("in words.ppm", content, RED, image)
    yield HostileFile("in words, cut off.ppm", content[:300], reason=DAMAGED)
    yield HostileFile("no such level.ppm", b"P3 1 1 255 300 0 0\n", reason=DAMAGED)
    values = np.asarray(image)[::-1, :, ::-1]  # from below, blue first
    upside_down = struct.pack("<IiiHHIIiiII", 40, 96, -64, 1, 24, 0, values.nbytes, 0, 0, 0, 0)
    start = b"BM" + struct.pack("<IHHI", 54 + values.nbytes, 0, 0, 54)
    content = start + upside_down + values[::-1].tobytes()
    yield HostileFile("from above.bmp", content, RED, image)
    old = b"BM" + struct.pack("<IHHI", 26 + values.nbytes, 0, 0, 26)
    old += struct.pack("<IHHHH", 12, 96, 64, 1, 24) + values.tobytes()
    yield HostileFile("of OS 2.bmp", old, RED, image)
    values = np.dstack([values, np.zeros(values.shape[:2], np.uint8)])
    head = struct.pack("<IiiHHIIiiII", 40, 96, 64, 1, 32, 0, values.nbytes, 0, 0, 0, 0)
    content = start + head + values.tobytes()
    yield HostileFile("32 bits without alpha.bmp", content, RED, image)
    indices = image.quantize(8, dither=Image.Dither.NONE)
    yield HostileFile("run lengths.bmp", rle_bitmap(indices), RED, image)


def profiles() -> Iterable[HostileFile]:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("sRGB", srgb), ("damaged", b"\0" * 20 + srgb[20:300]), ("junk", b"?")):
        for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("TIFF", "tif"), ("WEBP", "webp")):
            yield of_picture(f"profile, {name}.{suffix}", kind, LIME, icc_profile=profile)
    yield of_picture("profile, RGB for CMYK.jpg", "JPEG", LIME, "CMYK", icc_profile=srgb)
    parts = encoded(picture(RED), "JPEG", icc_profile=srgb * 40)
    start = parts.index(b"ICC_PROFILE\0") + 12
    parts = parts[:start] + b"\x09" + parts[start + 1 :]
    yield HostileFile("profile, parts out of order.jpg", parts, RED, picture(RED))


GROUPS = (
    *(alpha, palettes, depths, floats, orientations, damaged_exif, first_frames, jpegs, pngs),
    *(tiffs, other_formats, profiles),
)
