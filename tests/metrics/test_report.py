"""The page and the plots: whatever names and captions hold, and in a real browser."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioner.errors import UsageError
from captioner.metrics.evaluation import Evaluation
from captioner.metrics.report import (
    LONGEST_TEXT,
    _draw_distributions,
    find_missing_images,
    write_plot,
    write_report,
)
from captioner.metrics.scores import score

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCRIPT = "<script>document.title = 'attacked'</script>"
HANDLER = "<img src=x onerror=\"document.title = 'attacked'\">"
RED, LIME = (255, 0, 0), (0, 255, 0)

# File names in the images' folder, all of them images.
INSIDE = [
    "javascript:alert(1).jpg",
    "$x^2$ #1?.jpg",
    f"{'n' * 200}.jpg",
    "caf\udce9.jpg",
    "<b>.jpg",
]
# Names that reach outside, of images that are there; and names of no file.
OUTSIDE = ["../outside.jpg", "a/../../outside.jpg", "OUTSIDE"]
NOWHERE = ["x" * 300, SCRIPT, "nul\0.jpg", "javascript:alert(1)"]


class Page(HTMLParser):
    """What a browser finds in a page.

    Attributes:
        elements: How often each element comes.
        addresses: The addresses of the images.
        text: All text.
    """

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag == "img":
            self.addresses.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in INSIDE:
        Image.new("RGB", (64, 48), RED).save(folder / "image.jpg", quality=100)
        (folder / "image.jpg").rename(folder / name)
    Image.new("RGB", (64, 48), LIME).save(tmp_path / "outside.jpg", quality=100)
    return folder


def evaluate(file_names, captions, hypotheses=("a.json",)):
    references = {key: [caption, "a dog"] for key, caption in enumerate(captions)}
    results = {name: dict(enumerate(captions)) for name in hypotheses}
    evaluation = Evaluation(references, results, dict(enumerate(file_names)))
    scores = {name: score(texts, references, "BLEU-1") for name, texts in results.items()}
    summary = {"scores": {name: each.corpus for name, each in scores.items()}, "signature": "s"}
    return evaluation, scores, summary


def hostile(tmp_path):
    names = [*INSIDE, *OUTSIDE, *NOWHERE]
    names[names.index("OUTSIDE")] = str(tmp_path / "outside.jpg")
    captions = [SCRIPT, HANDLER, "long " * 20_000, "lone \ud800", "nul\0 \x1b[31m", "{{ 7 * 7 }}"]
    captions += ["a dog"] * (len(names) - len(captions))
    return evaluate(names, captions, ["$x^2$.json", f"_{SCRIPT}", "caf\udce9.json", "猫" * 80])


@pytest.mark.parametrize("embed", [True, False])
def test_hostile_names_and_captions_are_text(tmp_path, images, embed):
    write_report(tmp_path / "page.html", *hostile(tmp_path), images, embed)
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(content)
    assert page.elements["script"] == page.elements["a"] == 0
    assert page.elements["img"] == 1 + len(INSIDE)
    assert page.elements["figure"] == len([*INSIDE, *OUTSIDE, *NOWHERE])
    assert page.addresses.pop(0).startswith("data:image/png;base64,")
    start = "data:image/jpeg;base64," if embed else "images/"
    assert all(address.startswith(start) for address in page.addresses)
    assert embed or "images/javascript%3Aalert%281%29.jpg" in page.addresses
    assert page.text.count("reaches outside the folder of the images") == len(OUTSIDE)
    for text in (SCRIPT, HANDLER, "lone \\ud800", "{{ 7 * 7 }}", "caf\\udce9.json", "$x^2$.json"):
        assert text in page.text
    assert len(page.text) < 40 * LONGEST_TEXT


def test_a_page_without_images_or_names(tmp_path):
    write_report(tmp_path / "page.html", *evaluate(["a.jpg"], ["a dog"]))
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).elements["img"] == 1
    write_report(tmp_path / "page.html", *evaluate([], ["", "a"]), tmp_path)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.elements["img"] == 1
    assert "(empty)" in page.text


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser Chromium")
def test_a_browser_shows_the_images_and_runs_nothing(tmp_path, images):
    write_report(tmp_path / "page.html", *hostile(tmp_path), images, embed=False)
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,5000"),
        *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
        *(f"--screenshot={tmp_path / 'page.png'}", "--dump-dom", f"file://{tmp_path}/page.html"),
    ]
    dom = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()
    page = Page(dom)
    assert "<title>Caption scores</title>" in dom
    assert page.elements["script"] == 0
    assert SCRIPT in page.text
    with Image.open(tmp_path / "page.png") as screenshot:
        pixels = np.asarray(screenshot.convert("RGB")).astype(int)
    area = {colour: near(pixels, colour).sum() for colour in (RED, LIME)}
    assert area[LIME] == 0
    assert area[RED] == pytest.approx(len(INSIDE) * 64 * 48, rel=0.05)
    # Long names are broken, so the page keeps its margin, and needs no scroll bar there.
    assert np.all(pixels[-20:] == 255)


def near(pixels, colour):
    return np.abs(pixels - colour).max(axis=-1) < 30


def test_images_that_are_not_there_are_counted(images):
    evaluation, *_ = evaluate([*INSIDE, "B.JPG", "none.jpg"], ["a"] * (len(INSIDE) + 2))
    (images / "b.jpg").write_bytes(b"")
    (note,) = find_missing_images(evaluation, images)
    assert note.startswith(f"2 of 7 images are not in {images} ('B.JPG', 'none.jpg'); did you mean")
    assert "'b.jpg'" in note
    assert find_missing_images(evaluation, None) == []
    assert find_missing_images(evaluate(INSIDE, ["a"] * len(INSIDE))[0], images) == []
    (note,) = find_missing_images(evaluate([], ["a"])[0], images)
    assert "name no image files" in note


def test_image_files_are_opened_in_one_place():
    opening = {
        path.name
        for folder in ("captioner", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if "Image.open(" in path.read_text(encoding="utf-8")
    }
    assert opening == {"image_formats.py"}


# --- plots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_names_in_a_legend_are_shown_as_they_are(tmp_path, suffix):
    names = ["$x^2$", "$\\frac{", "_hidden", "caf\udce9", "猫 \n two", "n" * 300]
    _, scores, _ = evaluate([], ["a", "b"], names)
    write_plot(tmp_path / f"p{suffix}", scores)
    assert (tmp_path / f"p{suffix}").stat().st_size > 1000
    figure = _draw_distributions(scores)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:4] == ["$x^2$", "$\\frac{", " _hidden", "caf\\udce9"]
    assert not any(text.get_parse_math() for text in legend.get_texts())
    assert len(texts[-1]) < 40


@pytest.mark.filterwarnings("ignore:Glyph")
def test_many_files_of_long_names_leave_room_for_the_plot(tmp_path):
    _, scores, _ = evaluate([], ["a", "b"], [f"{number}{'猫' * 80}" for number in range(20)])
    figure = _draw_distributions(scores)
    figure.savefig(tmp_path / "p.svg")  # lays it out
    axes = figure.axes[0].get_window_extent()
    assert axes.height > 100
    assert not axes.overlaps(figure.legends[0].get_window_extent())


def test_a_plot_of_another_suffix_is_refused_and_nothing_written(tmp_path):
    _, scores, _ = evaluate([], ["a"])
    with pytest.raises(UsageError, match=r"must end in \.png, \.svg or \.pdf"):
        write_plot(tmp_path / "p.jpg", scores)
    assert os.listdir(tmp_path) == []


# --- the package ---------------------------------------------------------------------------------


def test_a_built_package_holds_the_template(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "captioner", source / "captioner")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "captioner/metrics/report.html.jinja" in archive.namelist()
