"""The page that talks to the service: one file, which names all that a browser may run of it."""

import base64
import functools
import hashlib
import importlib.resources
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """A page and what a browser may do with it.

    Attributes:
        content: Its HTML, in UTF-8.
        policy: Its Content-Security-Policy: its own script and style by their hashes, pictures that
            the user gave, this server; nothing else.
    """

    content: bytes
    policy: str


@functools.cache
def read_page() -> Page:
    """Return the page of the package."""
    content = importlib.resources.files(__package__).joinpath("page.html").read_bytes()
    hashes = {name: _hash(content, name) for name in ("script", "style")}
    rules = (
        "default-src 'none'",
        f"script-src {hashes['script']}",
        f"style-src {hashes['style']}",
        "img-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return Page(content, "; ".join(rules))


def _hash(content: bytes, name: str) -> str:
    """Return the hash of an element's text, as a policy names it."""
    found = re.search(rf"<{name}>(.*?)</{name}>".encode(), content, re.DOTALL)
    assert found, f"the page has no {name}"
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1]).digest()).decode()}'"
