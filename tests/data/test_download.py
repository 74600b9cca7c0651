"""``tools/download_coco.py`` against a real HTTP server on this machine, with tiny archives."""

import errno
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioner.commands import download as command
from captioner.data import download
from captioner.data.annotations import read_annotations
from captioner.errors import DataError
from captioner.experiment_file import load_config

ROOT = Path(__file__).parents[2]
COCO_MINI = ROOT.parent / "shared" / "data" / "coco_mini"
TRAIN, VAL = "/zips/train2017.zip", "/zips/val2017.zip"
ANNOTATIONS, KARPATHY = "/annotations/annotations_trainval2017.zip", "/caption_datasets.zip"
TRAIN_IDS, VAL_IDS = [9, 25, 30, 391895, 581929], [139, 285, 397133]


# --- the server -----------------------------------------------------------------------------


@dataclass
class Served:
    """A file on the server and how it behaves; ``faults`` befall one request each."""

    content: bytes
    etag: str | None = '"one"'
    modified: str | None = "Thu, 01 Sep 2017 10:00:00 GMT"
    kind: str = "application/zip"
    ranges: bool = True
    heeds_if_range: bool = True
    tells_length: bool = True
    faults: list[tuple[str, int]] = field(default_factory=list)
    requests: list[str | None] = field(default_factory=list)  # their Range headers
    conditions: list[str | None] = field(default_factory=list)  # their If-Range headers
    sent: list[int] = field(default_factory=list)  # body bytes of each answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        served = self.server.files.get(self.path)
        if served is None:
            return self.send_error(404)
        served.requests.append(self.headers.get("Range"))
        served.conditions.append(self.headers.get("If-Range"))
        fault, number = served.faults.pop(0) if served.faults else ("", 0)
        if fault == "status":
            return self.send_error(number)
        self._answer(served, number if fault == "drop" else len(served.content), fault == "hang")
        return None

    def _answer(self, served: Served, at_most: int, hang: bool) -> None:
        total, start = len(served.content), 0
        asked = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, served.etag, served.modified)
        if asked and served.ranges and (same or not served.heeds_if_range):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= total > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if served.tells_length:
            self.send_header("Content-Length", str(total - start))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.send_header("Content-Type", served.kind)
        for name, value in (("ETag", served.etag), ("Last-Modified", served.modified)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        body = served.content[start:][:at_most]
        if hang:
            body = body[: len(body) // 2]
        served.sent.append(len(body))
        self.wfile.write(body)
        self.wfile.flush()
        if hang:
            self.server.let_go.wait(30)
        if len(body) < total - start:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, Served] = {}
        self.let_go = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.let_go.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# --- tiny COCO ------------------------------------------------------------------------------


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def name_of(image_id: int) -> str:
    return f"{image_id:012}.jpg"


def images(folder: str, ids: list[int]) -> dict[str, bytes]:
    return {f"{folder}/": b"", **{f"{folder}/{name_of(each)}": jpeg(each) for each in ids}}


def captions(ids: list[int]) -> bytes:
    content = {
        "images": [{"id": each, "file_name": name_of(each)} for each in ids],
        "annotations": [
            {"id": each, "image_id": each, "caption": f"Noise number {each}."} for each in ids
        ],
    }
    return json.dumps(content).encode()


def karpathy(ids: list[int]) -> bytes:
    entries = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{name_of(each)}",
            "cocoid": each,
            "imgid": number,
            "split": ("train", "restval", "val", "test")[number % 4],
            "sentids": [number],
            "sentences": [
                {"raw": f"Café noise {each}.", "tokens": ["café", "noise"], "sentid": number}
            ],
        }
        for number, each in enumerate(ids)
    ]
    return json.dumps({"dataset": "coco", "images": entries}).encode()


def tiny_coco() -> dict[str, Served]:
    """Return the four archives in the layout of the real ones, unwanted members included."""
    annotations = {
        "annotations/instances_train2017.json": b"{}",
        "annotations/captions_train2017.json": captions(TRAIN_IDS),
        "annotations/captions_val2017.json": captions(VAL_IDS),
        "annotations/person_keypoints_val2017.json": b"{}",
    }
    splits = {
        "dataset_coco.json": karpathy(VAL_IDS + TRAIN_IDS),
        "dataset_flickr8k.json": b"{}",
        "dataset_flickr30k.json": b"{}",
        "__MACOSX/._dataset_coco.json": b"junk",
    }
    return {
        TRAIN: Served(zipped(images("train2017", TRAIN_IDS))),
        VAL: Served(zipped(images("val2017", VAL_IDS))),
        ANNOTATIONS: Served(zipped(annotations, zipfile.ZIP_DEFLATED)),
        KARPATHY: Served(zipped(splits, zipfile.ZIP_DEFLATED)),
    }


@pytest.fixture
def coco(server: Server) -> Server:
    server.files = tiny_coco()
    return server


def publish(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the archives on the server the published ones, with their sizes and SHA-256."""
    files = {"train2017": len(TRAIN_IDS), "val2017": len(VAL_IDS), "annotations": 2, "karpathy": 3}
    for name, archive in download.COCO_ARCHIVES.items():
        content = server.files[f"/{archive.mirror_path}"].content
        tiny = replace(
            archive,
            url=f"{server.url}/{archive.mirror_path}",
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            files=files[name],
            room=1,
        )
        monkeypatch.setitem(download.COCO_ARCHIVES, name, tiny)
    monkeypatch.setattr(command, "KARPATHY_IMAGES", len(TRAIN_IDS + VAL_IDS))


def fetch(server: Server, directory: Path, *options: str) -> int:
    """Run the command on archives that aren't the published ones."""
    words = [str(directory), "--base-url", server.url, "--any-content", *options]
    return command.main(words)


def fetch_train(server: Server, directory: Path, *options: str) -> int:
    return fetch(server, directory, "--what", "train2017", *options)


def assert_train_images(directory: Path) -> None:
    found = {path.name: path.read_bytes() for path in (directory / "train2017").iterdir()}
    assert found == {name_of(each): jpeg(each) for each in TRAIN_IDS}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error, after checking that it is one line and the last one."""
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


# --- a whole run ----------------------------------------------------------------------------


def test_whole_run_then_nothing_to_do(
    coco: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    publish(coco, monkeypatch)
    directory = tmp_path / "a folder" / "coco"
    assert command.main([str(directory)]) == 0
    assert_train_images(directory)
    assert len(list((directory / "val2017").iterdir())) == len(VAL_IDS)
    assert sorted(path.name for path in (directory / "annotations").iterdir()) == [
        "captions_train2017.json",
        "captions_val2017.json",
        "dataset_coco.json",
        "dataset_coco2017.json",
        "dataset_flickr30k.json",
        "dataset_flickr8k.json",
    ]
    assert not list((directory / "downloads").glob("*.zip*part*"))
    assert not list((directory / "downloads").glob("*.zip"))
    assert all(served.requests == [None] for served in coco.files.values())

    output = capsys.readouterr().out
    assert f"split     {directory}/annotations/dataset_coco2017.json" in output
    words = shlex.split(output.splitlines()[-1])
    overrides = [word for word in words if word.startswith("data.")]
    data = load_config(ROOT / words[2], overrides).data
    assert (words[:2], words[-2]) == (["python", "tools/train.py"], "--output-dir")
    for images_folder, path, split, count in (
        (data.path("train_images"), data.path("train_annotations"), data.train_split, 4),
        (data.path("val_images"), data.path("val_annotations"), data.val_split, 2),
    ):
        read = read_annotations(path, split).images
        assert len(read) == count
        assert all((images_folder / str(image.file_name)).is_file() for image in read)

    assert command.main([str(directory)]) == 0
    assert all(served.requests == [None] for served in coco.files.values())
    said = capsys.readouterr().err
    assert "nothing to do" in said
    assert f"its {len(TRAIN_IDS)} files are already in {directory / 'train2017'}" in said


def test_official_captions_alone_print_their_train_command(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert fetch(coco, tmp_path, "--what", "annotations", "images", "--keep-archives") == 0
    output = capsys.readouterr().out
    words = shlex.split(output.splitlines()[-1])
    data = load_config(ROOT / words[2], [word for word in words if word.startswith("data.")]).data
    assert (data.train_split, data.val_split) == ("", "")
    assert data.path("train_annotations") == tmp_path / "annotations" / "captions_train2017.json"
    assert (data.path("val_images") / name_of(VAL_IDS[0])).is_file()
    assert not coco.files[KARPATHY].requests
    assert (tmp_path / "downloads" / "train2017.zip").read_bytes() == coco.files[TRAIN].content


def test_lost_and_changed_files_are_put_back(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert fetch_train(coco, tmp_path) == 0
    whole = tmp_path / "train2017" / name_of(9)
    before = whole.stat()
    lost, changed = (tmp_path / "train2017" / name_of(each) for each in TRAIN_IDS[1:3])
    lost.unlink()
    content = bytearray(changed.read_bytes())
    content[100] ^= 255
    changed.write_bytes(content)
    assert fetch_train(coco, tmp_path, "--recheck") == 0
    assert f"2 of its {len(TRAIN_IDS)} files are missing or changed" in capsys.readouterr().err
    assert_train_images(tmp_path)
    assert (whole.stat().st_mtime_ns, whole.stat().st_ino) == (before.st_mtime_ns, before.st_ino)

    os.truncate(changed, 10)
    assert fetch_train(coco, tmp_path) == 0
    assert_train_images(tmp_path)


def test_own_archive_is_used_without_a_network(coco: Server, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "train2017.zip").write_bytes(coco.files[TRAIN].content)
    assert fetch_train(coco, tmp_path) == 0
    assert_train_images(tmp_path)
    assert not coco.files[TRAIN].requests


def test_real_coco_files(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if not COCO_MINI.exists():
        pytest.skip("../shared/data/coco_mini is not here")
    ids = {}
    for part in ("train2017", "val2017"):
        paths = sorted((COCO_MINI / part).iterdir())[:12]
        ids[part] = [int(path.stem) for path in paths]
        members = {f"{part}/{path.name}": path.read_bytes() for path in paths}
        server.files[f"/zips/{part}.zip"] = Served(zipped(members, zipfile.ZIP_DEFLATED))
    paths = (COCO_MINI / "annotations").glob("captions_*.json")
    members = {f"annotations/{path.name}": path.read_bytes() for path in paths}
    server.files[ANNOTATIONS] = Served(zipped(members, zipfile.ZIP_DEFLATED))
    split = karpathy(ids["val2017"] + ids["train2017"])
    server.files[KARPATHY] = Served(zipped({"dataset_coco.json": split}))
    assert fetch(server, tmp_path) == 0
    read = read_annotations(tmp_path / "annotations" / "dataset_coco2017.json").images
    for image in read:
        content = (tmp_path / str(image.file_name)).read_bytes()
        assert content == (COCO_MINI / str(image.file_name)).read_bytes()
    assert len(read) == 24
    assert len(read_annotations(tmp_path / "annotations/captions_val2017.json").images) == 79


# --- interruptions --------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_killed_process_is_continued(coco: Server, tmp_path: Path) -> None:
    served = coco.files[TRAIN]
    served.faults = [("hang", 0)]
    half = len(served.content) // 2
    part = tmp_path / "downloads" / "train2017.zip.part"
    words = [str(tmp_path), "--base-url", coco.url, "--any-content", "--what", "train2017"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "download_coco.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: part.exists() and part.stat().st_size > half - 9000)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    there = part.stat().st_size
    assert 0 < there <= half
    assert fetch_train(coco, tmp_path) == 0
    assert served.requests == [None, f"bytes={there}-"]
    assert served.sent[1] == len(served.content) - there
    assert_train_images(tmp_path)


def test_dropped_connection_is_continued(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    served = coco.files[TRAIN]
    served.faults = [("drop", 5000), ("drop", 3000), ("status", 503), ("drop", 1)]
    assert fetch_train(coco, tmp_path) == 0
    assert served.requests == [None, "bytes=5000-", *["bytes=8000-"] * 2, "bytes=8001-"]
    assert sum(served.sent) == len(served.content)
    assert "the connection was dropped after 5.0 kB" in capsys.readouterr().err
    assert_train_images(tmp_path)


def test_retries_count_from_the_last_new_byte(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    served = coco.files[TRAIN]
    served.faults = [("status", 500), ("status", 502), ("drop", 9), ("status", 500), ("drop", 0)]
    assert fetch_train(coco, tmp_path, "--retries", "2") == 0
    served.faults = [("status", 500)] * 3
    assert fetch_train(coco, tmp_path / "other", "--retries", "2") == 1
    assert "given up after 3 tries without a new byte (the server answered 500" in error_line(
        capsys
    )


def test_server_that_drops_and_cannot_continue_is_given_up(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    coco.files[TRAIN].ranges = False
    coco.files[TRAIN].faults = [("drop", 500)] * 9
    assert fetch_train(coco, tmp_path, "--retries", "3") == 1
    assert "given up after 4 tries" in error_line(capsys)
    assert len(coco.files[TRAIN].requests) == 5  # the first brought new bytes


def test_server_that_ignores_range_sends_all_again(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    served = coco.files[TRAIN]
    served.ranges = False
    served.faults = [("drop", 5000)]
    assert fetch_train(coco, tmp_path) == 0
    assert served.sent == [5000, len(served.content)]
    assert "can't continue it: starting again, 5.0 kB are lost" in capsys.readouterr().err
    assert_train_images(tmp_path)


@pytest.mark.parametrize("told_by", ["etag", "modified", "size", "etag without If-Range"])
def test_file_that_changed_meanwhile_is_fetched_anew(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture, told_by: str
) -> None:
    old = zipped(images("train2017", [7, 8]))
    served = coco.files[TRAIN] = Served(old, faults=[("drop", 5000), *[("status", 500)] * 2])
    if told_by in ("modified", "size"):
        served.etag = None if told_by == "size" else 'W/"weak"'
    if told_by == "size":
        served.modified = None
    assert fetch_train(coco, tmp_path, "--retries", "1") == 1
    new = zipped(images("train2017", TRAIN_IDS))
    coco.files[TRAIN] = replace(served, content=new, faults=[], requests=[], conditions=[], sent=[])
    if told_by.startswith("etag"):
        coco.files[TRAIN].etag = '"two"'
    coco.files[TRAIN].heeds_if_range = told_by != "etag without If-Range"
    if told_by == "modified":
        coco.files[TRAIN].modified = "Fri, 02 Sep 2017 10:00:00 GMT"
    assert fetch_train(coco, tmp_path) == 0
    assert coco.files[TRAIN].requests[0] == "bytes=5000-"
    condition = {"modified": served.modified, "size": None}.get(told_by, '"one"')
    assert coco.files[TRAIN].conditions[0] == condition
    assert coco.files[TRAIN].sent[-1] == len(new)
    assert "has changed" in capsys.readouterr().err
    assert_train_images(tmp_path)


def test_whole_part_is_not_asked_for_again(coco: Server, tmp_path: Path) -> None:
    content = coco.files[TRAIN].content
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "train2017.zip.part").write_bytes(content)
    state = {"size": len(content), "etag": '"one"', "modified": None}
    (tmp_path / "downloads" / "train2017.zip.part.json").write_text(json.dumps(state))
    assert fetch_train(coco, tmp_path) == 0
    assert not coco.files[TRAIN].requests


def test_part_longer_than_the_file_is_dropped(coco: Server, tmp_path: Path) -> None:
    content = coco.files[TRAIN].content
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "train2017.zip.part").write_bytes(content + b"more")
    (tmp_path / "downloads" / "train2017.zip.part.json").write_text('{"etag": "\\"one\\""}')
    assert fetch_train(coco, tmp_path) == 0
    assert coco.files[TRAIN].requests == [f"bytes={len(content) + 4}-", None]
    assert_train_images(tmp_path)


def test_part_of_unknown_origin_is_not_continued(coco: Server, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "train2017.zip.part").write_bytes(b"PK\x03\x04 of something else")
    assert fetch_train(coco, tmp_path) == 0
    assert coco.files[TRAIN].requests == [None]
    assert_train_images(tmp_path)


def test_stopped_unpacking_is_continued(
    coco: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = download._extract

    def stop(content: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
        if member.filename.endswith(name_of(TRAIN_IDS[2])):
            path.with_name(f".{path.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        extract(content, member, path)

    with monkeypatch.context() as patch:
        patch.setattr(download, "_extract", stop)
        assert fetch_train(coco, tmp_path) == 130
    there = {path: path.stat().st_ino for path in (tmp_path / "train2017").glob("0*.jpg")}
    assert len(there) == 2
    assert fetch_train(coco, tmp_path) == 0
    assert len(coco.files[TRAIN].requests) == 1
    assert all(path.stat().st_ino == inode for path, inode in there.items())
    assert_train_images(tmp_path)


# --- what can't work ------------------------------------------------------------------------


def test_missing_file_on_the_server(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    del coco.files[TRAIN]
    assert fetch_train(coco, tmp_path) == 1
    assert f"{coco.url}{TRAIN}: the server answered 404 Not Found" in error_line(capsys)


def test_no_network(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    url = f"http://127.0.0.1:{port}"
    assert command.main([str(tmp_path), "--what", "val2017", "--base-url", url]) == 1
    assert time.monotonic() - started < 5
    assert "no connection (Connection refused); is there a network" in error_line(capsys)


@pytest.mark.parametrize("length", [3, 70_000])
def test_web_page_in_place_of_the_archive(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture, length: int
) -> None:
    page = b"<!DOCTYPE html>\n<title>Log in</title>".ljust(length)[:length]
    coco.files[TRAIN] = Served(page, kind="text/html")
    assert fetch_train(coco, tmp_path) == 1
    assert "not a zip archive but text/html, beginning '<!D" in error_line(capsys)
    assert not list((tmp_path / "downloads").glob("train2017*"))


def test_other_size_than_the_published(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [str(tmp_path), "--what", "val2017", "--base-url", coco.url]
    assert command.main(words) == 1
    assert "the published one 815,585,330" in error_line(capsys)
    assert not list((tmp_path / "downloads").glob("val2017*"))


def test_plan_refuses_a_small_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    archives = list(download.COCO_ARCHIVES.values())
    needed = download.room_needed(archives, tmp_path, keep_archives=False)
    kept = download.room_needed(archives, tmp_path, keep_archives=True)
    assert 39e9 < needed < 41e9
    assert needed < kept < 43e9
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert command.main([str(tmp_path / "new")]) == 1
    gigabytes = f"{needed / 1e9:.1f} GB"
    expected = f"{gigabytes} are needed (archives and unpacked files), {gigabytes} are free"
    assert expected in error_line(capsys)
    assert not (tmp_path / "new").exists()


def test_room_counts_what_is_there(tmp_path: Path) -> None:
    archive = replace(download.COCO_ARCHIVES["val2017"], size=5000, room=6000)
    assert download.room_needed([archive], tmp_path, False) == 11000
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "val2017.zip.part").write_bytes(bytes(1500))
    assert download.room_needed([archive], tmp_path, False) == 9500
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / name_of(1)).write_bytes(bytes(1000))
    (tmp_path / "downloads" / "val2017.zip").write_bytes(bytes(5000))
    assert download.room_needed([archive], tmp_path, False) == 5000


@pytest.mark.parametrize(("free", "stage"), [(5000, "the rest of"), (30_000, "unpacking")])
def test_small_disk_where_sizes_show_late(
    coco: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    free: int,
    stage: str,
) -> None:
    coco.files[TRAIN].content = zipped({f"train2017/{name_of(9)}": bytes(50_000)}, 8)
    if stage == "the rest of":
        coco.files[TRAIN].content = zipped({f"train2017/{name_of(9)}": bytes(50_000)})
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert fetch_train(coco, tmp_path) == 1
    assert re.search(f"50.* kB are needed \\({stage} train2017.zip\\)", error_line(capsys))


def test_disk_that_fills_up(coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "train2017.zip.part").symlink_to("/dev/full")
    assert fetch_train(coco, tmp_path) == 1
    assert "the disk is full; make room and run this again" in error_line(capsys)


def test_disk_that_fills_up_while_unpacking(
    coco: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert fetch_train(coco, tmp_path) == 1
    assert "the disk is full" in error_line(capsys)
    assert not list((tmp_path / "train2017").iterdir())
    assert (tmp_path / "downloads" / "train2017.zip").exists()


def test_file_where_a_folder_is_needed(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "train2017").write_text("a file")
    assert fetch_train(coco, tmp_path) == 1
    assert "train2017: can't be read or written (File exists)" in error_line(capsys)


def test_second_process_is_kept_out(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with download.only_one(tmp_path):
        assert fetch_train(coco, tmp_path) == 1
    assert "another download into it is at work" in error_line(capsys)
    assert fetch_train(coco, tmp_path) == 0


@pytest.mark.parametrize("url", ["images.cocodataset.org", "ftp://host/coco", "http://"])
def test_wrong_base_url_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture, url: str
) -> None:
    assert command.main([str(tmp_path), "--base-url", url]) == 2
    assert f"--base-url {url}: an http or https address" in error_line(capsys)


# --- damaged and hostile archives -----------------------------------------------------------


def damage(content: bytes, image_id: int) -> bytes:
    """Flip a byte in the stored data of one image."""
    at = content.index(jpeg(image_id)) + 200
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def test_damaged_member_is_fetched_once_more(
    coco: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    good = coco.files[TRAIN].content
    coco.files[TRAIN].content = damage(good, 25)
    check = download._check_archive

    def repair(path: Path, archive: download.Archive) -> None:
        check(path, archive)
        coco.files[TRAIN].content = good  # the server has the good one from the second time on

    monkeypatch.setattr(download, "_check_archive", repair)
    assert fetch_train(coco, tmp_path) == 0
    said = capsys.readouterr().err
    assert f"1 of {len(TRAIN_IDS)} files in it are damaged (train2017/{name_of(25)})" in said
    assert len(coco.files[TRAIN].requests) == 2
    assert_train_images(tmp_path)


def test_member_that_stays_damaged_is_refused(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    coco.files[TRAIN].content = damage(coco.files[TRAIN].content, 25)
    assert fetch_train(coco, tmp_path) == 1
    assert f"damaged (train2017/{name_of(25)}); delete it and run this again" in error_line(capsys)
    assert len(coco.files[TRAIN].requests) == 2
    written = {path.name for path in (tmp_path / "train2017").iterdir()}
    assert written == {name_of(each) for each in TRAIN_IDS if each != 25}


def test_own_damaged_archive_is_refused_and_kept(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "downloads" / "train2017.zip"
    path.parent.mkdir()
    path.write_bytes(coco.files[TRAIN].content[:-30])
    assert fetch_train(coco, tmp_path) == 1
    assert f"{path}: not a whole zip archive" in error_line(capsys)
    assert path.exists()
    assert not coco.files[TRAIN].requests


def test_own_archive_of_another_size_is_refused(
    coco: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    publish(coco, monkeypatch)
    unchecked = replace(download.COCO_ARCHIVES["karpathy"], sha256=None)
    monkeypatch.setitem(download.COCO_ARCHIVES, "karpathy", unchecked)
    path = tmp_path / "downloads" / "caption_datasets.zip"
    path.parent.mkdir()
    path.write_bytes(coco.files[VAL].content)
    assert command.main([str(tmp_path), "--what", "karpathy"]) == 1
    assert f"bytes, the published has {unchecked.size:,}; delete it" in error_line(capsys)


def test_wrong_checksum_is_refused(
    coco: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    publish(coco, monkeypatch)
    coco.files[TRAIN].content = damage(coco.files[TRAIN].content, 25)
    assert command.main([str(tmp_path), "--what", "train2017"]) == 1
    assert "the published archive's is " in error_line(capsys)
    assert len(coco.files[TRAIN].requests) == 2
    assert not (tmp_path / "train2017").exists()


def test_archive_cut_short_without_a_length(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    coco.files[TRAIN].tells_length = False
    coco.files[TRAIN].faults = [("drop", 5000)]
    assert fetch_train(coco, tmp_path) == 0
    assert "not a whole zip archive" in capsys.readouterr().err
    assert_train_images(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../escaped.jpg",
        "/tmp/escaped.jpg",
        "train2017/../../escaped.jpg",
        "..\\escaped.jpg",
        "C:\\escaped.jpg",
        "train2017/a\nb.jpg",
    ],
)
def test_names_that_point_outside_are_refused(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    directory = tmp_path / "inner" / "coco"
    coco.files[TRAIN].content = zipped({**images("train2017", [9]), name: jpeg(1)})
    assert fetch_train(coco, directory) == 1
    refusal = f"1 names in it point outside its folder or are links ({name!r})"
    assert f"refused, nothing was unpacked: {refusal}" in error_line(capsys)
    assert not (directory / "train2017").exists()
    assert not list(tmp_path.rglob("*escaped*"))


def test_links_are_refused(coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    link = zipfile.ZipInfo(f"train2017/{name_of(9)}")
    link.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    coco.files[TRAIN].content = buffer.getvalue()
    assert fetch_train(coco, tmp_path) == 1
    assert "or are links" in error_line(capsys)


def test_other_contents_than_expected(
    coco: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    coco.files[TRAIN].content = coco.files[VAL].content
    assert fetch_train(coco, tmp_path) == 1
    assert "were expected in it, found 0" in error_line(capsys)
    coco.files.update(tiny_coco())
    publish(coco, monkeypatch)
    short = replace(download.COCO_ARCHIVES["train2017"], files=118_287)
    monkeypatch.setitem(download.COCO_ARCHIVES, "train2017", short)
    assert command.main([str(tmp_path / "other"), "--what", "train2017"]) == 1
    assert "118287 files named like" in error_line(capsys)


# --- the Karpathy split ---------------------------------------------------------------------


def karpathy_folder(directory: Path, with_captions: bool, with_images: bool) -> Path:
    (directory / "annotations").mkdir()
    source = directory / "annotations" / "dataset_coco.json"
    source.write_bytes(karpathy(VAL_IDS + TRAIN_IDS))
    for folder, ids in (("train2017", TRAIN_IDS), ("val2017", VAL_IDS)):
        if with_captions:
            (directory / "annotations" / f"captions_{folder}.json").write_bytes(captions(ids))
        if with_images:
            (directory / folder).mkdir()
            for each in ids:
                (directory / folder / name_of(each)).touch()
    return source


@pytest.mark.parametrize(("with_captions", "with_images"), [(True, False), (False, True)])
def test_karpathy_images_are_placed(tmp_path: Path, with_captions: bool, with_images: bool) -> None:
    source = karpathy_folder(tmp_path, with_captions, with_images)
    target = download.place_karpathy_images(tmp_path, images=8)
    assert target == tmp_path / "annotations" / "dataset_coco2017.json"
    old, new = json.loads(source.read_text()), json.loads(target.read_text(encoding="utf-8"))
    for before, after in zip(old["images"], new["images"], strict=True):
        folder = "train2017" if before["cocoid"] in TRAIN_IDS else "val2017"
        assert after == {**before, "filepath": folder, "filename": name_of(before["cocoid"])}
    assert len(new["images"]) == 8

    written = target.stat().st_mtime_ns
    assert download.place_karpathy_images(tmp_path, images=8) == target
    assert target.stat().st_mtime_ns == written


def test_karpathy_images_on_disk_outweigh_captions(tmp_path: Path) -> None:
    karpathy_folder(tmp_path, with_captions=True, with_images=True)
    (tmp_path / "val2017" / name_of(139)).rename(tmp_path / "train2017" / name_of(139))
    (tmp_path / "val2017" / name_of(285)).unlink()
    target = download.place_karpathy_images(tmp_path, images=None)
    assert target
    names = {image.image_id: image.file_name for image in read_annotations(target).images}
    assert names[139] == f"train2017/{name_of(139)}"
    assert names[285] == f"val2017/{name_of(285)}"


def test_karpathy_split_waits_for_images_or_captions(
    coco: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert fetch(coco, tmp_path, "--what", "karpathy") == 0
    said = capsys.readouterr()
    assert "dataset_coco2017.json is not written: it takes the images or the captions" in said.err
    assert "train with" not in said.out
    assert fetch(coco, tmp_path, "--what", "annotations") == 0
    assert (tmp_path / "annotations" / "dataset_coco2017.json").exists()


@pytest.mark.parametrize(
    ("content", "count", "message"),
    [
        (karpathy([9, 1, 2]), None, r"2 of 3 images are in neither .* \(cocoid 1, 2\)"),
        (karpathy([9]), download.KARPATHY_IMAGES, "123,287 images were expected, found 1"),
        (b'{"images": [{"filename": "x.jpg"}]}', None, "an integer 'cocoid'"),
        (b"[]", None, "an integer 'cocoid'"),
        (b'{"images": [', None, "not valid JSON"),
    ],
)
def test_unusable_karpathy_files_are_refused(
    tmp_path: Path, content: bytes, count: int | None, message: str
) -> None:
    source = karpathy_folder(tmp_path, with_captions=True, with_images=False)
    source.write_bytes(content)
    with pytest.raises(DataError, match=message):
        download.place_karpathy_images(tmp_path, count)
    assert not (tmp_path / "annotations" / "dataset_coco2017.json").exists()
