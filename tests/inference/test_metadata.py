"""Captions in the images' own metadata; the pixels stay as they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyexiv2
import pytest
from conftest import draw
from PIL import Image
from run_commands import run_caption

from captioner.commands import caption

KINDS = ("jpg", "png", "tif", "webp", "jp2")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for kind in KINDS:
        draw("red", "disc").save(folder / "deep" / f"é {kind}.{kind}")
    draw("red", "disc").save(folder / "no metadata.gif")
    return folder


def description(path: Path) -> tuple[str, str]:
    with pyexiv2.Image(str(path)) as image:
        xmp, iptc = image.read_xmp(), image.read_iptc()
    text = xmp.get("Xmp.dc.description", {}).get('lang="x-default"', "")
    return text, iptc.get("Iptc.Application2.Caption", "")


def pixels(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*.*")):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image.convert("RGBA")).tobytes()
    return found


def test_copies_are_described_and_the_images_left(checkpoint, folder, tmp_path, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    copies = tmp_path / "copies"
    options = ["--metadata", copies]
    assert run_caption(checkpoint, folder, tmp_path / "c.jsonl", *options) == 0
    assert "no metadata.gif: its description isn't written (" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert len(list(copies.rglob("*.*"))) == len(KINDS)
    for kind in KINDS:
        texts = description(copies / "deep" / f"é {kind}.{kind}")
        text = "a red disc on white"
        assert texts == (text, "" if kind == "webp" else text)  # WebP has no IPTC
    assert pixels(copies).items() <= pixels(folder).items()


def test_in_place_nothing_is_captioned_again(checkpoint, folder, tmp_path, capsys):
    output, before = tmp_path / "c.jsonl", pixels(folder)
    data = (folder / "deep" / "é jpg.jpg").read_bytes()
    options = ["--metadata", "in-place"]
    assert run_caption(checkpoint, folder, output) == 0
    assert run_caption(checkpoint, folder, output, *options) == 0  # asked for later
    assert pixels(folder) == before
    now = (folder / "deep" / "é jpg.jpg").read_bytes()
    scan = data[data.index(b"\xff\xda") :]
    assert now.endswith(scan)  # not even decoded
    assert len(now) > len(data)
    capsys.readouterr()
    assert run_caption(checkpoint, folder, output, *options) == 0
    assert ", 0 of them now" in capsys.readouterr().out
    assert len(output.read_text().splitlines()) == len(KINDS) + 1
    assert not list(folder.rglob(".*"))


def test_what_people_wrote_stays(checkpoint, folder, tmp_path):
    mine, ours = folder / "deep" / "é jpg.jpg", folder / "deep" / "é png.png"
    with pyexiv2.Image(str(mine)) as image:
        image.modify_iptc({"Iptc.Application2.Caption": "my own words"})
    options = ["--metadata", "in-place", "--max-length", 2]
    assert run_caption(checkpoint, folder, tmp_path / "c.jsonl", *options) == 0
    assert description(mine) == ("", "my own words")
    assert description(ours)[0] == "a red"
    options = ["--metadata", "in-place", "--redo"]
    assert run_caption(checkpoint, folder, tmp_path / "c.jsonl", *options) == 0
    assert description(mine) == ("", "my own words")
    assert description(ours)[0] == "a red disc on white"
    assert run_caption(checkpoint, folder, tmp_path / "c.jsonl", *options, "--overwrite") == 0
    assert description(mine)[0] == "a red disc on white"
    assert run_caption(checkpoint, folder, tmp_path / "c.jsonl", *options, "--hash") == 2


def test_copies_stay_below_their_folder(checkpoint, folder, tmp_path):
    paths = [str(folder / "deep" / "é png.png"), str(folder / "deep" / ".." / "b.png")]
    shutil.copy(paths[0], paths[1])
    (tmp_path / "list").write_text("\n".join(paths))
    words = ["--from-file", tmp_path / "list", "--metadata", tmp_path / "copies"]
    words = [checkpoint, *words, "--output", tmp_path / "c.jsonl", "--device", "cpu"]
    assert caption.main([str(word) for word in words]) == 0
    names = list((tmp_path / "copies").rglob("*.png"))
    assert len(names) == 2
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rows] == paths
