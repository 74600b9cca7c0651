"""Which files are opened, how large an image may be, and that every way to it gives its pixels."""

import contextlib
import io
import multiprocessing
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, features

from captioner.data import image_files
from captioner.data.image_files import load_image, load_thumbnail, max_pixels, to_rgb
from captioner.data.image_formats import FORMATS
from captioner.data.images import _ImageFiles, load_pixels
from captioner.data.preprocessing import DecodingMemory, Preprocessing
from captioner.errors import ConfigError, ImageError


def waves(width, height):
    """A smooth image of many colours."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    values = np.stack([np.sin(x / 60), np.cos(y / 45), np.sin((x + y) / 80)], -1)
    return Image.fromarray((127 + 120 * values).astype(np.uint8))


def png(width, height, bits, colour_type, rows=b""):
    """A PNG file's content that is as large as its header says only if ``rows`` are."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", bytes(768)), (b"IDAT", zlib.compress(rows))]
    if colour_type != 3:
        del chunks[1]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in [*chunks, (b"IEND", b"")])


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_scans(content, count):
    """Repeat a progressive JPEG's last scan until it has ``count``."""
    start = content.rindex(b"\xff\xc4", 0, content.rindex(b"\xff\xda"))  # its Huffman table
    more = content[start:-2] * (count - content.count(b"\xff\xda"))
    return content[:-2] + more + b"\xff\xd9"


# --- the same pixels --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["turned.jpg", "progressive.jpg", "palette.png", "a.webp", "a.tif"]
)
def test_each_way_to_an_image_gives_the_same_pixels(tmp_path, name):
    path, image, options = tmp_path / name, waves(1500, 1300), {}
    if name == "turned.jpg":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    if name == "palette.png":
        image = image.quantize(64)
    image.save(path, progressive="progressive" in name, **options)
    preprocessing = Preprocessing("squash", 64)
    expected = preprocessing.load(path)
    if name.endswith("jpg"):  # and that it is scaled by its decoder changes them
        assert not torch.equal(expected, preprocessing(load_image(path)))
    content = path.read_bytes()
    with open(path, "rb") as file, Image.open(path) as opened:
        for source in (str(path), content, io.BytesIO(content), file, opened):
            assert torch.equal(preprocessing.load(source), expected)
        assert torch.equal(preprocessing.load(Image.open(io.BytesIO(content))), expected)
        assert opened.size == (1500, 1300)  # as it was
        assert np.array_equal(np.asarray(opened), np.asarray(Image.open(path)))
        assert not file.closed


def test_a_jpeg_that_is_decoded_already_is_close(tmp_path):
    """Its decoder can't scale it any more: the one exception."""
    path = tmp_path / "a.jpg"
    waves(1600, 1296).save(path, quality=95)
    for resize in ("squash", "crop"):
        preprocessing = Preprocessing(resize, 64, 80)
        with Image.open(path) as image:
            image.load()
            decoded = preprocessing.load(image)
        difference = (decoded.int() - preprocessing.load(path).int()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.5


def test_another_frame_stays_chosen_and_drafts_stay_drafted():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime")]
    image = Image.open(
        io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    )
    image.seek(1)
    assert load_image(image).getpixel((3, 3)) == (0, 255, 0)
    image = Image.open(io.BytesIO(encoded(waves(800, 800), "JPEG")))
    image.draft(None, (100, 100))
    assert load_image(image).size == (100, 100)


def test_of_several_jpegs_in_one_file_the_first_is_taken():
    content = encoded(
        waves(800, 640), "MPO", save_all=True, append_images=[Image.new("RGB", (800, 640))]
    )
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert load_image(content, 160).size == (200, 160)
    first = load_image(encoded(waves(800, 640), "JPEG"))
    assert np.array_equal(np.asarray(load_image(content)), np.asarray(first))


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_strips_are_converted_as_the_whole(monkeypatch, mode, turn):
    image = waves(70, 61)
    if mode in ("I;16", "F"):
        values = np.asarray(image.convert("L"))
        image = Image.fromarray(values * np.uint16(200) if mode == "I;16" else values / 7 - 3.3)
    else:
        image = image.convert(mode)
    if mode == "P":
        image.info["transparency"] = 30
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = image.getexif()
    exif[0x0112] = turn
    whole = to_rgb(image)
    assert whole.size == ((70, 61) if turn == 1 else (61, 70))
    for pixels in (1, 350, 700):
        monkeypatch.setattr(image_files, "STRIP_PIXELS", pixels)
        assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(whole))


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_large_images_are_scaled_by_a_whole_number_first(monkeypatch, mode):
    image = waves(650, 550).convert("RGBA" if mode == "RGBA" else "RGB")
    image = image.quantize(200) if mode == "P" else image
    exact = np.asarray(to_rgb(image, 200).resize((100, 100), Image.Resampling.BILINEAR)).astype(int)
    monkeypatch.setattr(image_files, "EXACT_PIXELS", 300_000)
    content = encoded(image, "PNG")
    large = load_image(content, 200)
    assert large.size == (325, 275)
    found = np.asarray(large.resize((100, 100), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(found - exact).max() <= 6
    assert load_image(content).size == (650, 550)
    assert load_image(content, 300).size == (650, 550)
    monkeypatch.setattr(image_files, "STRIP_PIXELS", 1300)
    assert np.array_equal(np.asarray(load_image(content, 200)), np.asarray(large))


def test_thumbnails(tmp_path):
    waves(1300, 700).save(tmp_path / "a.png")
    assert load_thumbnail(tmp_path / "a.png", 130).size == (130, 70)


# --- what is opened ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_the_listed_formats_are_read(kind):
    if kind in ("AVIF", "WEBP") and not features.check(kind.lower()):
        pytest.skip(f"needs a Pillow with {kind}")
    content = encoded(Image.new("RGB", (32, 32), (250, 10, 10)), kind)
    pixels = np.asarray(load_image(content)).astype(int)
    assert pixels.shape == (32, 32, 3)
    assert np.abs(pixels - (250, 10, 10)).max() <= 6


@pytest.mark.parametrize("kind", ["PCX", "SGI", "MSP", "EPS"])
def test_other_formats_are_not(kind):
    content = encoded(waves(32, 16).convert("1" if kind == "MSP" else "RGB"), kind)
    assert Image.open(io.BytesIO(content)).format == kind
    with pytest.raises(ImageError, match="not a readable image"):
        load_image(content)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell: the program is a script")
def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow has Ghostscript read EPS, whatever the file is called."""
    mark = tmp_path / "was started"
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    path = tmp_path / "x.jpg"
    waves(32, 16).save(path, "EPS")
    with contextlib.suppress(OSError), Image.open(path) as image:
        image.load()
    assert mark.exists()  # it would be
    mark.unlink()
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match="not a readable image"):
            load_image(source)
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes (os.mkfifo)")
def test_pipes_devices_and_sockets_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "terminal.jpg").symlink_to("/dev/tty")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket.jpg"))
        paths = sorted(tmp_path.iterdir())
        batches = load_pixels(paths, Preprocessing(), [range(4)], torch.device("cpu"), 2)
        failures = [message for _, message in next(batches).failures]
    assert len(failures) == 4
    for path, message in zip(paths, failures, strict=True):
        assert message.startswith(f"{path}: not a readable image (")
    assert "a pipe, device or socket, not a regular file" in failures[0]


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(13_300, 13_300, 16, 0), "176.9 megapixels are too many; scale it down, or set"),
        (png(13_300, 13_300, 8, 3), "CAPTIONER_MAX_MEGAPIXELS=177"),
        (png(30_000, 30_000, 1, 0), "more pixels than Pillow reads; scale it down"),
        # WebP, lossless, 13,000 x 13,000
        (
            b"RIFF\x1a\0\0\0WEBPVP8L\r\0\0\0/"
            + struct.pack("<I", 12_999 | 12_999 << 14)
            + b"\0" * 9,
            "",
        ),
    ],
)
def test_too_many_pixels_are_refused_before_they_are_decoded(content, expected):
    started = time.process_time()
    with pytest.raises(ImageError) as caught:
        load_image(content, name="a.jpg")
    assert time.process_time() - started < 0.5
    assert str(caught.value).startswith("a.jpg: ")
    assert expected in str(caught.value)


def test_the_limit_is_a_setting_and_the_message_tells_which(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    waves(1100, 1000).save(path)
    monkeypatch.setenv("CAPTIONER_MAX_MEGAPIXELS", "0.9")
    with pytest.raises(ImageError, match=r"1\.1 megapixels are too many") as caught:
        load_image(path, 100)
    with pytest.raises(ImageError), Image.open(path) as image:
        load_image(image)
    setting = re.search(r"(CAPTIONER_MAX_MEGAPIXELS)=(\S+)", str(caught.value))
    monkeypatch.setenv(setting[1], setting[2])
    assert load_image(path).size == (1100, 1000)


@pytest.mark.parametrize("text", ["many", "0", "-3", "nan", "inf"])
def test_an_impossible_limit_is_a_wrong_setting_not_a_bad_image(tmp_path, monkeypatch, text):
    monkeypatch.setenv("CAPTIONER_MAX_MEGAPIXELS", text)
    waves(20, 20).save(tmp_path / "a.png")
    expected = f"CAPTIONER_MAX_MEGAPIXELS: a number above 0 was expected, found '{text}'"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_image(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_pixels([tmp_path / "a.png"], Preprocessing(), [[0]], torch.device("cpu"))
    monkeypatch.setenv("CAPTIONER_MAX_MEGAPIXELS", "")
    assert max_pixels() == 64_000_000


def test_of_a_jpeg_the_pixels_that_are_decoded_count(monkeypatch):
    monkeypatch.setenv("CAPTIONER_MAX_MEGAPIXELS", "0.5")
    usual = encoded(waves(1600, 1200), "JPEG")
    assert load_image(usual, 200).size == (200, 150) or load_image(usual, 150).size == (200, 150)
    with pytest.raises(ImageError, match=r"1\.9 megapixels"):
        load_image(usual)
    progressive = encoded(waves(1600, 1200), "JPEG", progressive=True)
    with pytest.raises(ImageError, match=r"1\.9 megapixels"):  # all of it is held
        load_image(progressive, 150)


def test_a_jpeg_of_many_scans_counts_as_a_larger_one(monkeypatch):
    content = encoded(waves(640, 480), "JPEG", progressive=True)
    expected = np.asarray(load_image(content))
    assert 8 <= content.count(b"\xff\xda") <= 16
    monkeypatch.setenv("CAPTIONER_MAX_MEGAPIXELS", "0.31")
    assert np.array_equal(np.asarray(load_image(content)), expected)
    with pytest.raises(ImageError, match=r"0\.3 megapixels in 500 scans .*=10$"):
        load_image(with_scans(content, 500))
    monkeypatch.setenv("CAPTIONER_MAX_MEGAPIXELS", "10")
    assert load_image(with_scans(content, 500)).size == (640, 480)


def test_scans_of_an_embedded_thumbnail_or_a_second_image_are_not_counted(monkeypatch):
    thumbnail = with_scans(encoded(waves(64, 48), "JPEG", progressive=True), 100)
    monkeypatch.setenv("CAPTIONER_MAX_MEGAPIXELS", "0.31")
    for options in ({}, {"progressive": True}):
        content = encoded(waves(640, 480), "JPEG", comment=thumbnail[:60_000], **options)
        assert load_image(content + thumbnail).size == (640, 480)


def test_colours_in_scans_of_their_own_are_counted():
    """A sequential JPEG may have them too, and is then held as a progressive one is."""
    content = encoded(waves(64, 48), "JPEG")
    start = content.index(b"\xff\xda")
    one_colour = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
    image = image_files._open_file(io.BytesIO(content))
    assert image_files._count_scans(image, image.fp) == 1
    split = content[:start] + one_colour + b"\x12" * 9 + one_colour + content[start + 14 :]
    image = image_files._open_file(io.BytesIO(split))
    assert image_files._count_scans(image, image.fp) == 2


def test_icons(tmp_path):
    """Pillow decodes them when it opens them, as large as what they hold is."""
    waves(256, 256).save(tmp_path / "a.ico", sizes=[(256, 256)])
    assert load_image(tmp_path / "a.ico").size == (256, 256)
    content = png(9000, 9000, 16, 0)
    directory = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22)
    with pytest.raises(ImageError, match="an icon of 9000 x 9000 pixels"):
        load_image(directory + content)
    bitmap = struct.pack("<IiiHHIIiiII", 40, 9000, 18000, 1, 24, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ImageError, match="an icon of 9000 x 18000 pixels"):
        load_image(directory + bitmap)


def test_a_tiff_of_one_huge_tile():
    """Its decoder holds a whole tile, however little of it the image shows."""
    tags = {256: 64, 257: 64, 258: 8, 259: 5, 262: 1, 277: 1, 322: 9008, 323: 9008, 324: 8, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    with pytest.raises(ImageError, match=r"81\.1 megapixels are too many"):
        load_image(content)


def test_a_file_far_larger_than_its_pixels_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.webp"
    path.write_bytes(encoded(waves(64, 48), "WEBP"))
    assert load_image(path).size == (64, 48)
    os.truncate(path, 2 << 30)  # empty behind it: it takes no room
    with pytest.raises(ImageError, match=r"a file of 2\.1 GB"):
        load_image(path)


# --- memory -----------------------------------------------------------------------------------

MEMORY = """
import resource, sys
import torch
from captioner.data.image_files import load_image
from captioner.data.images import _ImageFiles, load_pixels
from captioner.data.preprocessing import DecodingMemory, Preprocessing
from captioner.memory import keep_freed_memory

def peak():  # getrusage's begins with the parent's
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0])

def load(count, threads):
    paths = [sys.argv[1]] * count
    return next(load_pixels(paths, Preprocessing(), [range(count)], torch.device("cpu"), threads))

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (50 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
try:
    load_image(sys.argv[1])
except MemoryError:
    print("out of memory")
for count in (1, 2):
    print(*(message for _, message in load(count, count - 1).failures), sep="; ")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

keep_freed_memory()  # as commands do: it must not have each thread keep its own
DecodingMemory.BLOCKS = 8
before = peak()
assert len(load(8, 8).indices) == 8
print((peak() - before) >> 10)
"""


@pytest.fixture(scope="module")
def memory_output(tmp_path_factory):
    """What was printed of a PNG that takes 64 MB, and as much when it is converted."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux, which tells the peak of memory and limits it")
    path = tmp_path_factory.mktemp("memory") / "a.png"
    Image.new("RGB", (4000, 4000)).save(path, compress_level=1)
    run = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_the_readers_together_keep_to_the_ceiling(memory_output):
    """Eight threads would take 512 MB at least; here one image is allowed at a time."""
    assert 60 < int(memory_output[-1]) < 250


def test_too_little_memory_is_no_unreadable_image(memory_output):
    """It is told as what it is; in a list of images it is one that fails."""
    error, *lists, _ = memory_output
    assert error == "out of memory"
    message = "a.png: there is too little memory to read it; free some, or scale the image down"
    assert [line.count(message) for line in lists] == [1, 2]


def test_an_image_without_memory_is_read_again_alone(tmp_path):
    """The second try has the whole ceiling for itself."""
    waves(64, 48).save(tmp_path / "a.png")
    memory = DecodingMemory(processes=False)
    had_all = []

    class ScarceAtFirst(Preprocessing):
        def open(self, source, reserve, name="", augmentation=None):
            had_all.append(not memory._blocks.acquire(blocking=False))
            if not had_all[-1]:
                memory._blocks.release()
                raise MemoryError
            return super().open(source, reserve)

    index, pixels, size, message = _ImageFiles(ScarceAtFirst(), memory)[0, tmp_path / "a.png"]
    assert (index, tuple(pixels.shape), size, message) == (0, (3, 224, 224), (64, 48), "")
    assert had_all == [False, True]
    assert all(memory._blocks.acquire(blocking=False) for _ in range(memory.BLOCKS))


def held_together(sizes, processes):
    """Let a reader for each size take it at once; return the most bytes that were held."""
    kind = multiprocessing.get_context("fork") if processes else threading
    memory = DecodingMemory(processes)
    counts = multiprocessing.Array("q", 2)  # held now, and at most

    def read(size):
        with memory.reader() as reserve:
            reserve(size)
            with counts.get_lock():
                counts[0] += size
                counts[1] = max(counts)
            time.sleep(0.02)
            with counts.get_lock():
                counts[0] -= size

    readers = [
        (kind.Process if processes else kind.Thread)(target=read, args=(size,)) for size in sizes
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(20)
    assert counts[0] == 0
    return counts[1]


@pytest.mark.parametrize("processes", [False, True])
def test_large_images_wait_for_each_other(processes):
    if processes and not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    mib = 1 << 20
    ceiling = DecodingMemory.BLOCK_BYTES * DecodingMemory.BLOCKS
    assert 400 * mib <= held_together([400 * mib] * 8, processes) <= ceiling
    assert held_together([640 * mib, 5000 * mib, 48 * mib], processes) <= 5000 * mib


def test_small_images_wait_for_none():
    memory = DecodingMemory(processes=False)
    with memory.reader() as reserve:
        reserve(5 << 30)
        assert held_by_another(memory, 15 << 20)
        assert not held_by_another(memory, 16 << 20)


def held_by_another(memory, size):
    done = threading.Event()

    def read():
        with memory.reader() as reserve:
            reserve(size)
            done.set()

    threading.Thread(target=read, daemon=True).start()
    return done.wait(0.2)


def test_what_an_image_held_is_free_again_after_an_error():
    memory = DecodingMemory(processes=False)
    preprocessing, damaged = Preprocessing(), encoded(Image.new("RGB", (2000, 2000)), "PNG")[:-100]
    with pytest.raises(ImageError), memory.reader() as reserve:
        preprocessing.load(damaged, reserve)
    assert held_by_another(memory, 5 << 30)
