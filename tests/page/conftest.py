"""Pages with the tiny captioner, for tests in a browser."""

import json
import shutil

import pytest
from served_pages import onnxruntime_web

from captioner.checksums import write_checksums
from captioner.page.writer import write_page

CONSTRAINED = {
    "min_length": 5,
    "no_repeat_ngram": 2,
    "no_repeat_word": True,
    "no_dangling_end": True,
    "forbidden": ["red square", "lime"],
}


@pytest.fixture(scope="session")
def exported(tiny_model, tmp_path_factory):
    """The tiny captioner in int8."""
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    from captioner.inference.onnx_export import export_captioner

    folder = tmp_path_factory.mktemp("exports") / "exported"
    export_captioner(tiny_model, folder, "int8")
    return folder


@pytest.fixture(scope="module")
def site(browser, exported, tmp_path_factory):
    """A page with the tiny captioner, and one whose search has constraints."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(exported, folder / "constrained")
    path = folder / "constrained/export.json"
    content = json.loads(path.read_text())
    content["search"] |= CONSTRAINED
    path.write_text(json.dumps(content))
    write_checksums(folder / "constrained")
    files = onnxruntime_web()
    write_page(folder / "page", exported, files)
    write_page(folder / "constrained_page", folder / "constrained", files)
    return folder


@pytest.fixture
def context(browser):
    context = browser.new_context()
    yield context
    context.close()
