"""The service's page, in a real browser."""

import base64
import contextlib

from browsers import wait_until
from running import RunningService

SCRIPT = "<img src=x onerror=document.title='forged'>.png"
GIVE = """([kind, name, data]) => {
  const bytes = Uint8Array.from(atob(data), each => each.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], name, {type: "image/png"}));
  document.dispatchEvent(kind === "drop"
    ? new DragEvent("drop", {dataTransfer: files, bubbles: true})
    : new ClipboardEvent("paste", {clipboardData: files, bubbles: true}));
}"""


def test_the_page(tiny_model, drawn, tmp_path, browser):
    """One test, so that service and browser start once; nothing goes wrong but what it does."""
    (tmp_path / "keys.txt").write_text("the-key\n")
    service = RunningService(tmp_path, tiny_model, "--api-key-file", tmp_path / "keys.txt")
    with contextlib.closing(service):
        tab = browser.new_page(viewport={"width": 390, "height": 800})
        problems = []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        tab.on("request", lambda request: problems.append(request.url) if away(request) else None)
        host, port = service.address
        tab.goto(f"http://{host}:{port}/")
        check_that_a_key_is_asked_for(tab, drawn)
        check_that_other_captions_are_chosen_by_keyboard(tab)
        for kind in ("drop", "paste"):
            check_what_is_given(tab, drawn, kind)
        check_a_file_that_cannot_be_read(tab, tmp_path)
        check_that_it_fits_a_telephone(tab)
        assert all("status of 4" in text for text in problems), problems
        assert tab.title() == "captioner"


def away(request) -> bool:
    return not request.url.startswith(("http://127.0.0.1:", "blob:"))


def captions(tab) -> list[str]:
    return tab.locator(".card:last-child label").all_text_contents()


def wait_for_cards(tab, count: int) -> None:
    wait_until(tab, f"document.querySelectorAll('.card fieldset').length === {count}")


def check_that_a_key_is_asked_for(tab, drawn):
    tab.set_input_files("#files", drawn.paths[:2])
    tab.locator(".state.bad").nth(1).wait_for()
    assert "an API key is needed" in tab.locator(".state").first.text_content()
    tab.fill("#key", "the-key")
    tab.keyboard.press("Enter")
    wait_for_cards(tab, 2)
    shown = [tab.locator(".card").nth(n).locator("label").first.text_content() for n in (0, 1)]
    assert shown == [drawn.captions[path.name] for path in drawn.paths[:2]]
    assert tab.locator(".card img").first.get_attribute("alt") == shown[0]
    assert tab.get_by_role("status").text_content().endswith(tuple(shown))


def check_that_other_captions_are_chosen_by_keyboard(tab):
    radios = tab.locator(".card").first.get_by_role("radio")
    assert radios.count() == 3
    radios.first.focus()
    tab.keyboard.press("ArrowDown")
    assert radios.nth(1).is_checked()
    chosen = radios.nth(1).get_attribute("value")
    assert tab.locator(".card img").first.get_attribute("alt") == chosen
    tab.select_option("#count", "5")
    wait_until(tab, "document.querySelectorAll('.card label').length === 10")


def check_what_is_given(tab, drawn, kind):
    before = tab.locator(".card").count()
    content = base64.b64encode(drawn.paths[3].read_bytes()).decode()
    tab.evaluate(GIVE, [kind, SCRIPT, content])
    wait_for_cards(tab, before + 1)
    assert tab.locator(".card:last-child h2").text_content() == SCRIPT
    assert captions(tab)[0] == drawn.captions[drawn.paths[3].name]


def check_a_file_that_cannot_be_read(tab, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(b"no image")
    tab.set_input_files("#camera", path)
    wait_until(tab, "document.querySelector('.card:last-child .bad')")
    assert tab.locator(".card:last-child .bad").text_content().startswith("bad.png: not a readable")
    tab.locator(".card:last-child").get_by_role("button", name="remove").click()


def check_that_it_fits_a_telephone(tab):
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for button in tab.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 44
        assert button.text_content().strip()
    assert tab.locator(".card").first.get_by_role("group").count() == 1  # its captions, with a name
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
    tab.click("#clear")
    assert tab.locator(".card").count() == 0
