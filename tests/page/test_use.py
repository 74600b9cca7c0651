"""The page as it is used: with files, keys and eyes closed; offline; with hostile names."""

import base64
import json
import shutil
import urllib.request

import pytest
from browsers import wait_until
from served_pages import open_page, served

from captioner.checksums import write_checksums
from captioner.errors import DataError
from captioner.page.npm import Package
from captioner.page.writer import write_page

SCRIPT = "<script>document.title='forged'<_script>.png"
AXE = Package(
    "axe-core",
    "4.14.1",
    "sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
    708_405,
)


@pytest.fixture
def files(drawn, tmp_path):
    """Three images, the last with a script for a name, and one that is none."""
    for path in drawn.paths[:2]:
        shutil.copy(path, tmp_path)
    shutil.copy(drawn.paths[2], tmp_path / SCRIPT)
    (tmp_path / "bad.png").write_text("no image")
    names = [*(path.name for path in drawn.paths[:2]), SCRIPT, "bad.png"]
    return [tmp_path / name for name in names]


def add(tab, files) -> None:
    """Choose files and wait until all are captioned, and all words are shown."""
    before = tab.locator(".card").count()
    tab.set_input_files("#chosen", files)
    busy = "document.querySelectorAll('.card[aria-busy=true]').length"
    count = "document.querySelectorAll('.card').length"
    wait_until(tab, f"{count} === {before + len(files)} && {busy} === 0")
    unfinished = "[...document.querySelectorAll('.card:not(.failed)')].some(card => {"
    unfinished += "const words = card.querySelectorAll('.words button');"
    unfinished += "return !words.length || words[words.length - 1].textContent !== '·' })"
    wait_until(tab, f"!{unfinished}")


def caption(card) -> str:
    return " ".join(card.locator(".words button").all_text_contents()).removesuffix(" ·")


def test_photographs_get_captions_words_and_maps(context, site, drawn, files):
    with served(site / "page") as address:
        requests = []
        tab, problems = open_page(context, address)
        context.on("request", lambda request: requests.append(request.url))
        assert tab.locator("#beams").input_value() == "3"  # as exported
        add(tab, files)
        assert not [url for url in requests if not url.startswith("blob:")]
        cards = tab.locator(".card")
        assert caption(cards.last) == drawn.captions[drawn.paths[0].name]
        assert cards.last.locator("img").get_attribute("alt") == caption(cards.last)

        # The name that holds a script is text; the file that is no image says so.
        assert tab.title() == "Caption your photographs"
        assert SCRIPT in cards.nth(1).locator(".about").inner_text()
        assert "can't read it" in cards.first.inner_text()
        assert tab.locator("#spoken").inner_text().startswith("bad.png: ")

        # A word shows its map.
        word, canvas = cards.last.locator(".words button").nth(1), cards.last.locator("canvas")
        wait_until(tab, "document.querySelectorAll('canvas:not([hidden])').length === 0")
        word.click()
        assert canvas.is_visible()
        assert word.get_attribute("aria-pressed") == "true"
        opacity = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 2, 2).data]"
        assert set(canvas.evaluate(opacity)[3::4]) != {0}
        assert canvas.bounding_box() == cards.last.locator("img").bounding_box()
        word.click()
        assert not canvas.is_visible()

        # Another of the n best, and another number of them.
        others = cards.last.locator(".others button")
        assert others.count() == 3
        second = others.nth(1).locator("span").inner_text()
        others.nth(1).click()
        assert caption(cards.last) == second
        tab.select_option("#beams", "1")
        wait_until(tab, "[...document.querySelectorAll('.others')].every(list => list.hidden)")
        assert not problems


def test_all_by_keyboard(context, site, files):
    with served(site / "page") as address:
        tab, _ = open_page(context, address)
        choosers = []
        tab.on("filechooser", lambda chooser: choosers.append(chooser))
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.id") == "choose"
        tab.keyboard.press("Enter")
        while not choosers:
            tab.wait_for_timeout(50)
        choosers[0].set_files(files[:1])
        wait_until(tab, "document.querySelectorAll('.others button').length === 3")
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.id") == "beams"
        tab.keyboard.press("Tab")
        focused = "document.activeElement"
        assert tab.evaluate(f"{focused}.closest('.words') !== null")
        outline = f"getComputedStyle({focused}).outlineStyle"
        assert tab.evaluate(outline) == "solid"
        tab.keyboard.press("Enter")
        assert tab.evaluate(f"{focused}.getAttribute('aria-pressed')") == "true"


PUT = """([kind, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], kind + ".png", { type: "image/png" }));
  const details = { bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data };
  document.body.dispatchEvent(
    kind === "paste" ? new ClipboardEvent(kind, details) : new DragEvent(kind, details));
}"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_pasted_and_dropped(context, site, drawn, kind):
    with served(site / "page") as address:
        tab, _ = open_page(context, address)
        content = base64.b64encode(drawn.paths[0].read_bytes()).decode()
        tab.evaluate(PUT, [kind, content])
        wait_until(tab, "document.querySelectorAll('.others button').length === 3")
        assert f"{kind}.png" in tab.locator(".about").inner_text()


def test_offline_after_the_first_load(context, site, drawn, files):
    with served(site / "page") as address:
        tab, _ = open_page(context, address)
        size = "caches.keys().then(names => caches.open(names[0])).then(cache => cache.keys())"
        wait_until(
            tab, f"{size}.then(kept => kept.filter(r => /onnx$|wasm$/.test(r.url)).length === 3)"
        )
        tab.close()
    with pytest.raises(OSError, match="refused"):  # nobody serves it any more
        urllib.request.urlopen(address)
    tab, problems = open_page(context, address)
    assert tab.evaluate("crossOriginIsolated")  # several threads, thanks to the service worker
    add(tab, files[:1])
    assert caption(tab.locator(".card")) == drawn.captions[drawn.paths[0].name]
    assert not problems


def test_a_page_that_is_made_anew_follows_the_old_one(context, site, exported_int8, tmp_path):
    folder = tmp_path / "page"
    shutil.copytree(site / "page", folder)
    with served(folder) as address:
        tab, _ = open_page(context, address)
        tab.close()
        files = {path.name: path.read_bytes() for path in (folder / "onnxruntime-web").iterdir()}
        changed = tmp_path / "changed"
        shutil.copytree(exported_int8, changed)
        content = json.loads((changed / "export.json").read_text())
        content["search"]["beam_size"] = 4
        (changed / "export.json").write_text(json.dumps(content))
        write_checksums(changed)
        write_page(folder, changed, files)
        tab, _ = open_page(context, address)  # the old one; meanwhile the new one is fetched
        waiting = "navigator.serviceWorker.getRegistration().then(each => each.waiting !== null)"
        wait_until(tab, waiting)
        assert tab.locator("#beams").input_value() == "3"
        tab.close()
        tab, _ = open_page(context, address)
        assert tab.locator("#beams").input_value() == "4"


def test_nothing_leaves_even_the_thread_that_captions(context, site):
    """The Content-Security-Policy binds the page and its worker."""
    with served(site / "page") as address, served(site) as elsewhere:
        tab, _ = open_page(context, address)
        ask = f"fetch('{elsewhere}', {{ mode: 'no-cors' }}).then(() => 'sent', () => 'refused')"
        assert tab.evaluate(ask) == "refused"
        (worker,) = tab.workers
        assert worker.evaluate(ask) == "refused"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_finding_of_axe(browser, site, files, scheme):
    try:
        (axe,) = AXE.read(["axe.min.js"])
    except DataError as error:
        pytest.skip(f"needs axe-core: {error}")
    context = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 844})
    with served(site / "page") as address:
        tab, _ = open_page(context, address)
        add(tab, files)
        tab.evaluate(axe.decode())
        found = tab.evaluate("axe.run()")
        assert len(found["passes"]) > 15
        serious = [
            each for each in found["violations"] if each["impact"] in ("serious", "critical")
        ]
        assert not serious, json.dumps(serious, indent=1)[:3000]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390  # nothing beyond a phone
    context.close()
