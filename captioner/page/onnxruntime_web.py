"""onnxruntime-web, which computes in the browser: fetched from the npm registry, checked and kept."""

import base64
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

from captioner.data.download import download
from captioner.errors import DataError
from captioner.files import error_naming, locked, open_regular, read_json

VERSION = "1.30.0"
INTEGRITY = (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
"""Of the package's archive, as the registry tells it (``npm view … dist.integrity``)."""
MOST_BYTES = 40_000_000  # the archive has 33 million

DEFAULT_REGISTRY = "https://registry.npmjs.org"
ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"

# What a page needs of the package, and what it is called there: all servers know .js.
FILES = {
    "ort.wasm.min.mjs": "ort.wasm.min.js",
    "ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
    "ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}


def read_onnxruntime_web(source: Path | None = None) -> dict[str, bytes]:
    """Return the files of onnxruntime-web that a page needs, by the names that they have there.

    Args:
        source: The package's archive, or a folder that it was unpacked into; None fetches the
            archive, unless it was fetched before.

    Raises:
        DataError: It can't be fetched or read, it was changed, or it is another version.
    """
    if source is not None and source.is_dir():
        return _read_folder(source)
    return _read_archive(_fetch() if source is None else source)


def _fetch() -> Path:
    """Return the archive, from the cache if it is there."""
    path = _cache() / ARCHIVE
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), f"another process fetches {ARCHIVE}: waiting for it"):
        if not path.exists():
            download(f"{registry(os.environ)}/onnxruntime-web/-/{ARCHIVE}", path, MOST_BYTES)
            try:
                _read_archive(path)
            except DataError:
                path.unlink()  # to be fetched again
                raise
    return path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "captioner"


def registry(environment: Mapping[str, str]) -> str:
    """Return the address of the npm registry that the user has set, else npm's own.

    Set are ``npm_config_registry``, or ``registry`` in the user's ``.npmrc``.

    Args:
        environment: The process' variables.

    Raises:
        DataError: What is set is no http or https address.
    """
    variables = {name.lower(): value for name, value in environment.items() if value}
    address = variables.get("npm_config_registry") or _registry_in_npmrc(variables)
    address = (address or DEFAULT_REGISTRY).rstrip("/")
    if not re.match("https?://", address):
        raise DataError(f"npm's registry: an http or https address was expected, found '{address}'")
    return address


def _registry_in_npmrc(variables: Mapping[str, str]) -> str | None:
    path = Path(variables.get("npm_config_userconfig", "~/.npmrc")).expanduser()
    if not path.is_file():
        return None
    with error_naming(path, DataError):
        text = path.read_text(encoding="utf-8")
    found = re.findall(r"^\s*registry\s*=\s*(\S+)", text, re.MULTILINE)
    if not found:
        return None
    address = found[-1].strip("\"'")
    return re.sub(r"\$\{(\w+)\}", lambda name: variables.get(name[1].lower(), name[0]), address)


def _read_archive(path: Path) -> dict[str, bytes]:
    with error_naming(path, DataError), open_regular(path) as file:
        content = file.read(MOST_BYTES)
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if f"sha512-{digest}" != INTEGRITY:
        raise DataError(f"{path}: not {ARCHIVE} as it was published, or it is damaged")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {new: archive.extractfile(f"package/dist/{old}") for old, new in FILES.items()}
        return {name: member.read() for name, member in members.items() if member}


def _read_folder(folder: Path) -> dict[str, bytes]:
    """Read a folder as npm unpacks it: node_modules/onnxruntime-web, say."""
    found = read_json(folder / "package.json", DataError).get("version")
    if found != VERSION:
        raise DataError(f"{folder}: onnxruntime-web {VERSION} was expected, found {found}")
    files = {}
    for old, new in FILES.items():
        path = folder / "dist" / old
        with error_naming(path, DataError), open_regular(path) as file:
            files[new] = file.read()
    return files
