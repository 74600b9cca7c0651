"""Writes the page: its own files, the captioner, onnxruntime-web, and a list of them.

index.html, …       as they are in ``static/``
model/              the exported captioner, see ``captioner.runtime.exported``
onnxruntime-web/    what computes in the browser
page.json           the files and their bytes, the page's version, and what captions may contain
"""

import dataclasses
import hashlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path

from captioner.checksums import CHECKSUMS_FILE, check_sha256, read_checksums
from captioner.data.vocabulary import Vocabulary
from captioner.errors import CheckpointError
from captioner.files import atomic_directory, error_naming, open_regular, read_json, write_json
from captioner.runtime.beam_search import check_settings
from captioner.runtime.exported import (
    ENCODER_FILE,
    EXPORT_FILE,
    NGRAMS_FILE,
    STEP_FILE,
    VOCABULARY_FILE,
    ExportConfig,
)
from captioner.search.rules import Constraints

STATIC = Path(__file__).parent / "static"
PAGE_FILE = "page.json"
SERVICE_WORKER = "service_worker.js"
MODEL_FILES = (ENCODER_FILE, STEP_FILE, EXPORT_FILE, VOCABULARY_FILE, CHECKSUMS_FILE)


def write_page(
    directory: str | Path, exported: str | Path, onnxruntime_web: Mapping[str, bytes]
) -> None:
    """Write the page into a folder, which is replaced when all is written.

    Args:
        directory: The folder.
        exported: What ``captioner export`` wrote.
        onnxruntime_web: The files of ``read_onnxruntime_web``.

    Raises:
        CheckpointError: There is no exported captioner, or it is damaged.
        ConfigError: It searches as no browser can.
    """
    exported = Path(exported)
    constraints = _constraints(exported)
    with atomic_directory(directory) as folder:
        shutil.copytree(STATIC, folder, dirs_exist_ok=True)
        (folder / "model").mkdir()
        for name, content in _read_model(exported).items():
            (folder / "model" / name).write_bytes(content)
        (folder / "onnxruntime-web").mkdir()
        shutil.move(folder / "onnxruntime-web.LICENSE.txt", folder / "onnxruntime-web/LICENSE.txt")
        for name, content in onnxruntime_web.items():
            (folder / "onnxruntime-web" / name).write_bytes(content)
        _write_version(folder)
        page = {"files": _sizes(folder), "constraints": dataclasses.asdict(constraints)}
        write_json(folder / PAGE_FILE, page)


def is_page(directory: str | Path) -> bool:
    """Tell whether a folder is what ``write_page`` wrote."""
    return (Path(directory) / PAGE_FILE).is_file()


def _constraints(exported: Path) -> Constraints:
    """Return what captions may contain, in token ids: no browser cuts text into words."""
    config = ExportConfig.read(exported)
    check_settings(config.search)
    vocabulary = Vocabulary(read_json(exported / VOCABULARY_FILE, CheckpointError))
    return Constraints.from_config(config.search, vocabulary)


def _read_model(exported: Path) -> dict[str, bytes]:
    """Return an exported captioner's files, which are those that were written."""
    contents = {}
    has_ngrams = (exported / NGRAMS_FILE).exists()
    for name in (*MODEL_FILES, *([NGRAMS_FILE] if has_ngrams else [])):
        with error_naming(exported / name, CheckpointError), open_regular(exported / name) as file:
            contents[name] = file.read()
    checksums = read_checksums(io.BytesIO(contents[CHECKSUMS_FILE]), exported)
    for name, content in contents.items():
        check_sha256(hashlib.sha256(content).hexdigest(), exported / name, checksums)
    return contents


def _write_version(folder: Path) -> None:
    """Tell the service worker which version this is, so that browsers notice another one."""
    digest = hashlib.sha256()
    for name in _sizes(folder):
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    worker = folder / SERVICE_WORKER
    text = worker.read_text(encoding="utf-8")
    assert text.count('"VERSION"') == 1
    text = text.replace('"VERSION"', f'"{digest.hexdigest()[:16]}"')
    worker.write_text(text, encoding="utf-8")


def _sizes(folder: Path) -> dict[str, int]:
    """Return the files below a folder, as addresses, and their bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
