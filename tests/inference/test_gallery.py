"""The page of captioned images, in a real browser."""

import json
import shutil
import time
from pathlib import Path

import pytest
from browsers import wait_until
from PIL import Image
from run_commands import run_caption

from captioner.commands import gallery
from captioner.inference.gallery import write_gallery
from captioner.inference.records import RankedCaption, Record

SCRIPT = "<script>document.title='forged'<_script>.png"


@pytest.fixture
def folder(drawn, tmp_path):
    folder = Path(shutil.copytree(drawn.images, tmp_path / "photos"))
    shutil.copy(drawn.paths[0], folder / SCRIPT)
    with Image.open(drawn.paths[2]) as image:  # browsers show no TIFF
        image.save(folder / "z.tiff")
    (folder / "bad.png").write_text("no image")
    return folder


@pytest.fixture
def page(checkpoint, folder, tmp_path, capsys):
    page = tmp_path / "my page.html"
    options = ["--gallery", page, "--n-best", 2]
    assert run_caption(checkpoint, folder, tmp_path / "c.jsonl", *options) == 3
    assert f"to look at them: {page}\n" in capsys.readouterr().out
    return page


def data(page: Path) -> dict:
    text = page.read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_what_comes_from_outside_is_data_alone(page, folder):
    text = page.read_text()
    assert text.count("<script") == 2
    assert "forged'<" not in text
    content = data(page)
    assert [image["name"] for image in content["images"]] == sorted(
        path.name for path in folder.iterdir() if path.name != "bad.png"
    )
    assert [each["name"] for each in content["failures"]] == ["bad.png"]
    files = page.with_name("my page_files")
    for image in content["images"]:
        with Image.open(files / f"{image['key']}.jpg") as thumbnail:
            assert thumbnail.format == "JPEG"
        maps = (files / f"{image['key']}.js").read_text()
        assert maps.startswith(f'bringAttention("{image["key"]}", {{"words":["a",')
        assert len(image["captions"]) == len(image["scores"]) == 2


def test_a_page_from_a_captions_file(page, checkpoint, folder, tmp_path, capsys):
    other = tmp_path / "other" / "page.html"
    words = [tmp_path / "c.jsonl", "--images", folder, "--output", other, "--device", "cpu"]
    assert gallery.main([str(word) for word in words]) == 0
    assert capsys.readouterr().out == f"10 images in {other}\n"
    shown, expected = data(other), data(page)
    for one, same in zip(shown["images"], expected["images"], strict=True):
        assert one["captions"] == same["captions"]
        assert one["scores"] == pytest.approx(same["scores"], abs=1e-3)
        assert (one["attention"], same["attention"]) == (False, True)
    assert len(list((tmp_path / "other" / "page_files").iterdir())) == 10
    words += ["--checkpoint", checkpoint]
    assert gallery.main([str(word) for word in words]) == 0
    assert all(image["attention"] for image in data(other)["images"])
    assert gallery.main([str(folder), "--output", str(other)]) == 2
    assert gallery.main([str(tmp_path / "none.jsonl"), "--output", str(other)]) == 1
    assert "none.jsonl: can't be read (No such file" in capsys.readouterr().err


# --- in a browser -----------------------------------------------------------------------------


def visible(tab) -> list[str]:
    return tab.locator(".card:not([hidden]) b").all_text_contents()


def test_search_order_and_overlay(browser, page):
    tab = browser.new_page()
    problems = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    tab.goto(page.as_uri())
    assert tab.title() == "Captions of c"  # the name that holds a script did nothing
    assert len(visible(tab)) == 10
    tab.keyboard.press("/")
    tab.keyboard.type("red squ")
    assert visible(tab) == ["a red square"]
    assert tab.locator("#count").inner_text() == "1 of 10 images"
    tab.fill("#search", "forged")
    assert tab.locator(".card:not([hidden]) small").text_content() == SCRIPT
    tab.fill("#search", "")

    tab.locator(".card").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    names = sorted(image["name"] for image in data(page)["images"])
    about = tab.locator("#about")
    assert about.inner_text() == f"{names[1]}, 72 × 64 pixels"
    assert tab.locator("#captions li").count() == 2
    tab.keyboard.press("ArrowRight")
    assert about.inner_text().startswith(names[2])
    word = tab.locator("#words button", has_text="a").first
    word.click()
    assert word.get_attribute("aria-pressed") == "true"
    assert tab.locator("canvas").is_visible()
    tab.keyboard.press("Escape")
    assert not tab.locator("#overlay").is_visible()
    tab.locator(".card", has_text="z.tiff").click()
    wait_until(tab, "picture.naturalWidth > 0")  # its thumbnail
    tab.locator("#close").click()
    tab.select_option("#order", "name")
    assert tab.locator(".card small").first.text_content() == names[0]
    back = "getComputedStyle(document.body).backgroundColor"
    before = tab.evaluate(back)
    tab.locator("#theme").click()
    assert tab.evaluate(back) != before
    assert "bad.png: " in tab.locator("#failures").inner_text()
    assert not problems
    tab.close()


@pytest.mark.parametrize("cut", [0, 0.5])
def test_attention_lies_over_what_the_cnn_saw(browser, page, cut):
    """The CNN saw the whole image, or a square in its middle; the word looked at its right half."""
    image = data(page)["images"][0]
    maps = {"words": ["a"], "size": [1, 2], "maps": [[0, 255]], "cut": cut}
    script = page.with_name("my page_files") / f"{image['key']}.js"
    script.write_text(f'bringAttention("{image["key"]}", {json.dumps(maps)})')
    tab = browser.new_page()
    tab.goto(page.as_uri())
    tab.locator(".card").first.click()
    wait_until(tab, "picture.naturalWidth > 0")
    tab.locator("#words button").first.click()
    context = "canvas.getContext('2d')"
    row = tab.evaluate(f"[...{context}.getImageData(0, canvas.height / 2, canvas.width, 1).data]")
    opacity = row[3::4]
    width, height = tab.evaluate("[canvas.width, canvas.height]")
    scale = min(width / image["width"], height / image["height"])
    across = scale * (cut * min(image["width"], image["height"]) if cut else image["width"])
    shown = scale * image["width"]

    def at(place: float) -> int:  # places of what the CNN saw, from 0 to 1
        return opacity[int((width - across) / 2 + place * across)]

    assert at(0.05) > 200
    assert at(0.95) < 50
    before = [(width - shown) / 2 + 3, (width - across) / 2 - 3]
    if cut:  # what it did not see is dark
        assert [opacity[int(place)] for place in before] == [255, 255]
    tab.close()


def test_ten_thousand_images_are_usable(browser, drawn, tmp_path, capsys):
    """Prints the seconds: pytest -s -k thousand."""
    path = str(drawn.paths[0])
    captions = (RankedCaption("a red disc on white", -1.0, -0.2),)
    records = (Record(n, f"{n}.png", path, captions, 64, 64) for n in range(10_000))
    started = time.monotonic()
    write_gallery(tmp_path / "page.html", records)
    written = time.monotonic()
    tab = browser.new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    tab.locator(".card").first.wait_for()
    usable = time.monotonic()
    tab.fill("#search", "777")
    count = tab.locator("#count").inner_text()
    searched = time.monotonic()
    tab.close()
    assert count == f"{sum('777' in str(n) for n in range(10_000))} of 10000 images"
    with capsys.disabled():
        print(
            f"\nwritten in {written - started:.1f} s, usable after {usable - written:.1f} s, "
            f"searched in {searched - usable:.2f} s"
        )
