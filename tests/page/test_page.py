"""``captioner page``: what is in the folder, and where onnxruntime-web comes from."""

import base64
import hashlib
import io
import json
import re
import tarfile

import pytest
from served_pages import served

from captioner.commands import main
from captioner.errors import CheckpointError, ConfigError, DataError
from captioner.page.npm import DEFAULT_REGISTRY, Package, registry
from captioner.page.onnxruntime_web import FILES, ONNXRUNTIME_WEB
from captioner.page.writer import STATIC, write_page


@pytest.fixture
def unpacked(tmp_path):
    """A folder as npm would unpack onnxruntime-web into, of other content."""
    folder = tmp_path / "node_modules/onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    version = {"name": ONNXRUNTIME_WEB.name, "version": ONNXRUNTIME_WEB.version}
    (folder / "package.json").write_text(json.dumps(version))
    for name in FILES:
        (folder / name).write_text(f"// {name}")
    return folder


def run(*words) -> int:
    return main(["page", *map(str, words)])


def test_the_folder_is_complete(exported_int8, unpacked, tmp_path, capsys):
    site = tmp_path / "site"
    assert run(site, exported_int8, "--onnxruntime-web", unpacked) == 0
    assert f"python -m http.server --directory {site}" in capsys.readouterr().out
    page = json.loads((site / "page.json").read_text())
    there = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert there == {*page["files"], "page.json"}
    for name, size in page["files"].items():
        assert (site / name).stat().st_size == size
    for path in exported_int8.iterdir():
        assert (site / "model" / path.name).read_bytes() == path.read_bytes()
    assert "Microsoft" in (site / "onnxruntime-web/LICENSE.txt").read_text()
    for path in site.glob("*.*s"):  # all that a module or the style sheet names is there
        for name in re.findall(r'from "\./([^"]+)"', path.read_text()):
            assert (site / name).is_file(), name


def test_texts_become_nothing_but_text():
    text = "".join(path.read_text() for path in STATIC.glob("*.*"))
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
    page = (STATIC / "index.html").read_text()
    assert "default-src 'none'" in page
    assert "unsafe-inline" not in page
    assert not re.findall(r'<script(?! type="module" src=)|<style| on\w+=| style=', page)
    assert not re.findall("https?://", page)


def version(site) -> str:
    return re.search(r'VERSION = "(\w+)"', (site / "service_worker.js").read_text())[1]


def test_another_page_is_another_version(exported_int8, unpacked, tmp_path):
    site = tmp_path / "site"
    assert run(site, exported_int8, "--onnxruntime-web", unpacked) == 0
    first = version(site)
    assert run(site, exported_int8, "--onnxruntime-web", unpacked) == 0
    assert version(site) == first
    (unpacked / next(iter(FILES))).write_text("// changed")
    assert run(site, exported_int8, "--onnxruntime-web", unpacked) == 0
    assert version(site) != first


def test_a_checkpoint_is_exported_first(checkpoint, unpacked, tmp_path, capsys):
    site = tmp_path / "site"
    words = [site, checkpoint, "--onnxruntime-web", unpacked]
    assert run(*words, "--precision", "float16") == 0
    assert json.loads((site / "model/export.json").read_text())["precision"] == "float16"
    assert "captioner in float16" in capsys.readouterr().out


def test_errors_are_one_line(exported_int8, unpacked, tmp_path, capsys):
    site, given = tmp_path / "site", ["--onnxruntime-web", unpacked]

    def refused(exit_code: int, message: str, *words) -> None:
        assert run(*words) == exit_code
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert re.search(message, error[0])
        assert not site.exists()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    refused(2, "no page that this command wrote", tmp_path / "mine", exported_int8, *given)
    refused(2, "was exported in int8", site, exported_int8, "--precision", "float32", *given)
    refused(1, "no such checkpoint", site, "none", *given)
    refused(1, "none: can't be read|no such file", site, exported_int8, "--onnxruntime-web", "none")
    (unpacked / next(iter(FILES))).unlink()
    refused(1, "no such file", site, exported_int8, *given)
    (unpacked / "package.json").write_text('{"name": "onnxruntime-web", "version": "1.0.0"}')
    refused(1, r"was expected, found onnxruntime-web 1\.0\.0", site, exported_int8, *given)


def test_captioners_that_no_browser_can_run_are_refused(exported_int8, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in exported_int8.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "step.onnx").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"step\.onnx: not what was saved"):
        write_page(tmp_path / "site", copy, {})
    content = json.loads((copy / "export.json").read_text())
    content["search"]["forced"] = ["red"]
    (copy / "export.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"search\.forced needs torch"):
        write_page(tmp_path / "site", copy, {})
    assert not (tmp_path / "site").exists()


# --- the npm registry -------------------------------------------------------------------------


def archive(folder, content: bytes) -> Package:
    """Put a package where a registry has it; return it."""
    path = folder / "toy/-/toy-1.2.3.tgz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as file:
        entry = tarfile.TarInfo("package/dist/toy.js")
        entry.size = len(content)
        file.addfile(entry, io.BytesIO(content))
    data = path.read_bytes()
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    return Package("toy", "1.2.3", f"sha512-{digest}", len(data))


def use_registry(monkeypatch, address: str) -> None:
    monkeypatch.setenv("npm_config_registry", address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # urllib keeps a proxy that another test has set


def test_a_package_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = archive(tmp_path / "registry", b"content")
    with served(tmp_path / "registry") as address:
        use_registry(monkeypatch, address)
        assert package.read(["dist/toy.js"]) == [b"content"]
    assert package.read(["dist/toy.js"]) == [b"content"]  # from the cache
    kept = tmp_path / "cache/captioner/npm/toy-1.2.3.tgz"
    assert package.read(["dist/toy.js"], kept) == [b"content"]


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_package_is_refused_and_not_kept(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = archive(tmp_path / "registry", b"content")
    path = tmp_path / "registry/toy/-/toy-1.2.3.tgz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] if damage == "cut" else whole[:50] + b"!" + whole[51:])
    with pytest.raises(DataError, match=r"not toy-1\.2\.3\.tgz as it was published"):
        package.read(["dist/toy.js"], path)
    with served(tmp_path / "registry") as address:
        use_registry(monkeypatch, address)
        with pytest.raises(DataError, match="as it was published"):
            package.read(["dist/toy.js"])
        path.write_bytes(whole)
        assert package.read(["dist/toy.js"]) == [b"content"]


def test_the_users_registry_is_asked(tmp_path):
    settings = tmp_path / "npmrc"
    none = {"npm_config_userconfig": str(settings)}
    assert registry(none) == DEFAULT_REGISTRY
    settings.write_text(
        "# mine\nregistry = https://${HOST}/npm/\n@scope:registry=https://no.example\n"
    )
    assert registry({**none, "HOST": "one.example"}) == "https://one.example/npm"
    both = {**none, "NPM_CONFIG_REGISTRY": "https://two.example/"}
    assert registry(both) == "https://two.example"
    with pytest.raises(DataError, match="an http or https address"):
        registry({**none, "npm_config_registry": "ftp://three.example"})
