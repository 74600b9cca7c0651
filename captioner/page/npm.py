"""Packages of the npm registry: fetched once, checked against a checksum, and kept."""

import base64
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from captioner.data.download import download
from captioner.errors import DataError
from captioner.files import error_naming, locked, open_regular, read_json, read_text

DEFAULT_REGISTRY = "https://registry.npmjs.org"


@dataclass(frozen=True)
class Package:
    """One version of a package.

    Attributes:
        name: Without a scope.
        version: Its number.
        integrity: Of its archive, as ``npm view NAME@VERSION dist.integrity`` tells it.
        size: Of the archive, in bytes.
    """

    name: str
    version: str
    integrity: str
    size: int

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return f"{self.name}-{self.version}.tgz"

    def read(self, names: Iterable[str], source: Path | None = None) -> list[bytes]:
        """Return files of the package.

        Args:
            names: Their paths in it.
            source: Its archive, or a folder that it was unpacked into; None fetches the archive
                unless it was fetched before.

        Raises:
            DataError: It can't be fetched or read, it was changed, or it is another version.
        """
        if source is not None and source.is_dir():
            return self._read_folder(source, names)
        content = self._check(source) if source is not None else self._fetch()
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = [archive.extractfile(f"package/{name}") for name in names]
            return [member.read() for member in members if member]

    def _read_folder(self, folder: Path, names: Iterable[str]) -> list[bytes]:
        """Read a folder as npm unpacks it: node_modules/NAME, say."""
        found = read_json(folder / "package.json", DataError)
        if (found.get("name"), found.get("version")) != (self.name, self.version):
            raise DataError(
                f"{folder}: {self.name} {self.version} was expected, found {found.get('name')} "
                f"{found.get('version')}"
            )
        contents = []
        for name in names:
            with error_naming(folder / name, DataError), open_regular(folder / name) as file:
                contents.append(file.read())
        return contents

    def _fetch(self) -> bytes:
        """Return the archive, from the cache if it is there."""
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "captioner/npm"
        path = folder / self.archive
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"another process fetches {self.archive}: waiting for it"
        with locked(path.with_suffix(".lock"), busy):
            if not path.exists():
                address = f"{registry(os.environ)}/{self.name}/-/{self.archive}"
                download(address, path, self.size)
            try:
                return self._check(path)
            except DataError:
                path.unlink(missing_ok=True)  # to be fetched again
                raise

    def _check(self, path: Path) -> bytes:
        """Return an archive's bytes, which are those that were published."""
        with error_naming(path, DataError), open_regular(path) as file:
            content = file.read(self.size + 1)
        digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
        if f"sha512-{digest}" != self.integrity:
            raise DataError(f"{path}: not {self.archive} as it was published, or damaged")
        return content


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
    found = re.findall(r"^\s*registry\s*=\s*(\S+)", read_text(path, DataError), re.MULTILINE)
    if not found:
        return None
    address = found[-1].strip("\"'")
    return re.sub(r"\$\{(\w+)\}", lambda name: variables.get(name[1].lower(), name[0]), address)
