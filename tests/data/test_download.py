"""``tools/download_coco.py`` against a real HTTP server on this machine, with tiny archives."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from captioner.commands import download as command
from captioner.data import coco, download
from captioner.data.annotations import read_annotations
from captioner.errors import DataError

ROOT = Path(__file__).parents[2]
TRAIN, KARPATHY = "/zips/train2017.zip", "/caption_datasets.zip"
TRAIN_IDS, VAL_IDS = [9, 25, 30, 391895, 581929], [139, 285, 397133]


@dataclass
class Served:
    """A file on the server.

    Each of ``faults`` is met by one request: an error's "status", a "drop" or a "hang" after so
    many bytes, a false "length" before all bytes (with "" they end with the connection).
    """

    content: bytes
    faults: list[tuple[str, int | str]] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        served = self.server.files.get(self.path)
        if served is None:
            return self.send_error(404)
        served.ranges.append(self.headers.get("Range"))
        fault, value = served.faults.pop(0) if served.faults else ("", "")
        if fault == "status":
            return self.send_error(value)
        start, total = 0, len(served.content)
        if served.ranges[-1]:
            start = int(served.ranges[-1].removeprefix("bytes=").removesuffix("-"))
        if start >= total:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        length = value if fault == "length" else str(total - start)
        if length:
            self.send_header("Content-Length", length)
        self.end_headers()
        end = start + value if fault in ("drop", "hang") else None
        with contextlib.suppress(ConnectionError):  # it stopped listening
            self.wfile.write(served.content[start:end])
            self.wfile.flush()
        if fault == "hang":
            self.server.released.wait(30)
        self.close_connection = bool(fault)
        return None

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, Served] = {}
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


# --- tiny COCO --------------------------------------------------------------------------------


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def images(folder: str, ids: list[int]) -> dict[str, bytes]:
    return {f"{folder}/{number:012}.jpg": jpeg(number) for number in ids}


@pytest.fixture
def tiny_coco(server: Server) -> Server:
    """The four archives in the layout of the real ones, unwanted members included."""
    split = {
        "images": [
            {
                "filepath": "val2014",
                "filename": f"COCO_val2014_{number:012}.jpg",
                "cocoid": number,
                "split": ("train", "restval", "val", "test")[place % 4],
                "sentences": [{"raw": f"Café noise {number}.", "sentid": place}],
            }
            for place, number in enumerate(VAL_IDS + TRAIN_IDS)
        ]
    }
    annotations = {f"annotations/captions_{name}2017.json": b"{}" for name in ("train", "val")}
    others = {f"dataset_{name}.json": b"{}" for name in ("flickr8k", "flickr30k")}
    server.files = {
        TRAIN: Served(zipped(images("train2017", TRAIN_IDS))),
        "/zips/val2017.zip": Served(zipped(images("val2017", VAL_IDS))),
        "/annotations/annotations_trainval2017.zip": Served(
            zipped({**annotations, "annotations/instances_train2017.json": b"{}"})
        ),
        KARPATHY: Served(zipped({"dataset_coco.json": json.dumps(split).encode(), **others})),
    }
    return server


def run(server: Server, directory: Path, *options: str) -> int:
    return command.main([str(directory), "--base-url", server.url, "--any-content", *options])


def train_archive(server: Server, **changes: object) -> coco.Archive:
    """The archive of train2017 as if the tiny one were the published one."""
    content = server.files[TRAIN].content
    return replace(
        coco.COCO_ARCHIVES["train2017"],
        url=server.url + TRAIN,
        **{
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            **changes,
        },
    )


def assert_train_images(directory: Path) -> None:
    files = {f"train2017/{p.name}": p.read_bytes() for p in (directory / "train2017").iterdir()}
    assert files == images("train2017", TRAIN_IDS)


# --- a whole run ------------------------------------------------------------------------------


def test_everything_is_fetched_and_a_second_run_finds_nothing_to_do(tiny_coco, tmp_path, capsys):
    assert run(tiny_coco, tmp_path) == 0
    assert_train_images(tmp_path)
    read = read_annotations(tmp_path / "annotations/dataset_coco2017.json", "train+restval")
    for image in read.images:
        assert (tmp_path / str(image.file_name)).is_file()
        assert image.captions == [f"Café noise {image.image_id}."]
    assert sorted(path.name for path in (tmp_path / "annotations").iterdir()) == [
        "captions_train2017.json",
        "captions_val2017.json",
        "dataset_coco.json",
        "dataset_coco2017.json",
        "dataset_flickr30k.json",
        "dataset_flickr8k.json",
    ]
    assert not list(tmp_path.glob("downloads/*.zip"))
    assert f"data.root={tmp_path}" in capsys.readouterr().out
    asked = {name: len(served.ranges) for name, served in tiny_coco.files.items()}
    assert run(tiny_coco, tmp_path) == 0
    assert asked == {name: len(served.ranges) for name, served in tiny_coco.files.items()}
    assert "nothing to do" in capsys.readouterr().err
    (tmp_path / "train2017" / f"{TRAIN_IDS[0]:012}.jpg").unlink()
    (tmp_path / "downloads/train2017.zip.done").unlink()
    assert run(tiny_coco, tmp_path, "--what", "train2017", "--keep-archives") == 0
    assert_train_images(tmp_path)
    assert (tmp_path / "downloads/train2017.zip").is_file()


def test_a_split_with_images_that_are_nowhere_is_refused(tiny_coco, tmp_path):
    assert run(tiny_coco, tmp_path) == 0
    (tmp_path / "val2017" / f"{VAL_IDS[1]:012}.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 8 images are in neither .*000000000285\.jpg"):
        coco.place_karpathy_images(tmp_path)


def test_a_second_process_is_kept_out(tiny_coco, tmp_path, capsys):
    (tmp_path / "downloads").mkdir()
    with FileLock(tmp_path / "downloads/.lock"):
        assert run(tiny_coco, tmp_path) == 1
    assert capsys.readouterr().err.startswith("error: ")


# --- one file over HTTP -----------------------------------------------------------------------


def test_drops_and_a_server_in_trouble_are_got_over(tiny_coco, tmp_path):
    served = tiny_coco.files[TRAIN]
    served.faults = [("drop", 1000), ("status", 503), ("drop", 500), ("status", 429)]
    download.download(tiny_coco.url + TRAIN, tmp_path / "a.zip", len(served.content))
    assert (tmp_path / "a.zip").read_bytes() == served.content
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    assert served.ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=1500-", "bytes=1500-"]


def test_a_killed_process_goes_on_where_it_was(tiny_coco, tmp_path):
    served = tiny_coco.files[TRAIN]
    served.faults = [("hang", 4000)]
    words = [sys.executable, ROOT / "tools/download_coco.py", tmp_path, "--any-content"]
    words += ["--base-url", tiny_coco.url, "--what", "train2017"]
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.DEVNULL)
    part = tmp_path / "downloads/train2017.zip.part"
    while not served.ranges:
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert part.stat().st_size <= 4000
    assert run(tiny_coco, tmp_path, "--what", "train2017") == 0
    assert_train_images(tmp_path)


@pytest.mark.parametrize("more", [0, 1])
def test_what_an_earlier_try_left_whole_or_too_long_is_fetched_anew(tiny_coco, tmp_path, more):
    served = tiny_coco.files[TRAIN]
    (tmp_path / "a.zip.part").write_bytes(served.content + bytes(more))
    download.download(tiny_coco.url + TRAIN, tmp_path / "a.zip", len(served.content))
    assert (tmp_path / "a.zip").read_bytes() == served.content


def test_what_does_not_pass_is_one_error(tiny_coco, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRIES", 1)
    with pytest.raises(DataError, match="404"):
        download.download(f"{tiny_coco.url}/none.zip", tmp_path / "a.zip", 7)
    with pytest.raises(DataError, match=r"given up after 2 tries \(.*refused\)"):
        download.download("http://127.0.0.1:9/a.zip", tmp_path / "b.zip", 7)
    assert not list(tmp_path.glob("*.zip"))


@pytest.mark.parametrize("length", [None, "", "-5", "9" * 5000, "x"])
def test_no_more_is_received_than_is_expected(tiny_coco, tmp_path, length):
    """Whether the server says how much comes, doesn't, or what it says is no length."""
    served, path = tiny_coco.files[TRAIN], tmp_path / "a.zip"
    size, url = len(served.content), tiny_coco.url + TRAIN
    served.faults = [] if length is None else [("length", length)] * 2
    download.download(url, path, size)
    assert path.read_bytes() == served.content
    path.unlink()
    with pytest.raises(DataError, match=f"sends more than the {size - 1:,} bytes expected"):
        download.download(url, path, size - 1)
    assert not list(tmp_path.iterdir())


# --- archives ---------------------------------------------------------------------------------


def test_the_published_archive_is_checked(tiny_coco, tmp_path):
    assert coco.fetch_archive(train_archive(tiny_coco), tmp_path / "good")
    assert_train_images(tmp_path / "good")
    with pytest.raises(DataError, match=r"SHA-256 are .*published archive .*0000"):
        coco.fetch_archive(train_archive(tiny_coco, sha256="0" * 64), tmp_path / "other")
    assert not list(tmp_path.glob("other/train2017/*"))
    with pytest.raises(DataError, match=r"no file in it is named like 'val2017"):
        coco.fetch_archive(train_archive(tiny_coco, members=r"val2017/(.*)"), tmp_path / "none")


@pytest.mark.parametrize("what", coco.COCO_ARCHIVES)
def test_bytes_are_bounded_for_every_archive(server, tmp_path, what):
    """Those of other archives than the published ones too."""
    archive = replace(coco.COCO_ARCHIVES[what], url=f"{server.url}/a.zip", published=False)
    name = f"{archive.folder}/000000000009.jpg"
    if archive.folder == "annotations":
        name = "annotations/captions_val2017.json" if what == "annotations" else "dataset_coco.json"
    server.files["/a.zip"] = Served(zipped({name: bytes(200_001)}))
    archive = replace(archive, unpacked=200_000)
    with pytest.raises(DataError, match="200,001 bytes, at most 200,000 were expected"):
        coco.fetch_archive(archive, tmp_path / "a")
    with pytest.raises(DataError, match="sends more than the 100 bytes expected"):
        coco.fetch_archive(replace(archive, size=100, unpacked=99), tmp_path / "b")
    assert not list(tmp_path.rglob("*.jp*g")) + list(tmp_path.rglob("*.json"))


def test_nothing_is_unpacked_outside_the_folder(server, tmp_path):
    link = zipfile.ZipInfo("train2017/000000000001.jpg")
    link.external_attr = 0o120777 << 16
    names = [
        *("../train2017/000000000009.jpg", "/train2017/000000000009.jpg", "000000000009.jpg"),
        *("train2017/../000000000009.jpg", "train2017/a/000000000009.jpg", "train2017/"),
        *(r"train2017\..\000000000009.jpg", "train2017/000000000009.jpg\n"),
    ]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc/passwd")
        for name in (*names, "train2017/000000000025.jpg"):
            archive.writestr(name, b"x")
    server.files[TRAIN] = Served(buffer.getvalue())
    coco.fetch_archive(train_archive(server), tmp_path / "a")
    assert [path.name for path in (tmp_path / "a/train2017").iterdir()] == ["000000000025.jpg"]
    assert not list(tmp_path.rglob("*09.jpg"))


def in_all_headers(content: bytes, place: int, value: int) -> bytes:
    """Return a zip archive with another byte in each member's two headers."""
    changed = bytearray(content)
    for signature, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        for found in re.finditer(re.escape(signature), content):
            changed[found.start() + place + shift] = value
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: in_all_headers(content, 6, 1),  # encrypted
        lambda content: in_all_headers(content, 8, 99),  # no known compression
        lambda content: content[: len(content) // 2],
        lambda content: content[:5000] + bytes([content[5000] ^ 255]) + content[5001:],
        lambda _: b"<html>Please log in</html>",
    ],
)
def test_a_damaged_archive_is_one_error_and_leaves_no_half_file(server, tmp_path, damage):
    server.files[TRAIN] = Served(damage(zipped(images("train2017", TRAIN_IDS))))
    with pytest.raises(DataError, match="not a whole zip archive"):
        coco.fetch_archive(train_archive(server), tmp_path)
    expected = images("train2017", TRAIN_IDS)
    for path in tmp_path.glob("train2017/0*.jpg"):
        assert path.read_bytes() == expected[f"train2017/{path.name}"]
