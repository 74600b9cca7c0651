"""What a client asks for: images and settings, read from a form or from JSON.

Nothing here reads a path or an address: an image is what the client has sent.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from email.message import Message
from typing import Any, NoReturn

from tornado.httputil import (
    HTTPFile,
    HTTPInputError,
    ParseMultipartConfig,
    parse_multipart_form_data,
)

from captioner.config import SearchConfig
from captioner.errors import ConfigError, RequestError, did_you_mean
from captioner.experiment_file import parse
from captioner.service.captioning import Wish
from captioner.service.settings import MOST_OF_SEARCH, MOST_PHRASES

FORM, JSON = "multipart/form-data", "application/json"
IMAGES, ATTENTION = "images", "attention"
SETTINGS = tuple(field.name for field in fields(SearchConfig))
_MOST_PARTS = 1000
_LONGEST_NAME = 255


@dataclass(frozen=True)
class SentImage:
    """An image as a client has sent it.

    Attributes:
        name: What the client calls it; nothing but a text.
        content: Of its file.
    """

    name: str
    content: bytes


@dataclass(frozen=True)
class CaptionRequest:
    """What a client asks for.

    Attributes:
        images: At least one.
        wish: How they are to be captioned.
    """

    images: list[SentImage]
    wish: Wish


def media_type(content_type: str) -> str:
    """Return which of the two kinds of body a Content-Type announces.

    Raises:
        RequestError: 415, it is neither.
    """
    kind = _header(content_type).get_content_type()
    if kind not in (FORM, JSON):
        raise RequestError(415, f"a body of {FORM} or {JSON} was expected")
    return kind


def read_request(
    body: bytes, content_type: str, search: SearchConfig, max_images: int
) -> CaptionRequest:
    """Read a request's body.

    Args:
        body: All of it.
        content_type: What its header says.
        search: The settings that hold where the client names no others.
        max_images: Most images of a request.

    Raises:
        RequestError: It is malformed, has too many images, or asks for what can't be.
    """
    read = _read_form if media_type(content_type) == FORM else _read_json
    images, settings = read(body, content_type)
    if not images:
        raise RequestError(400, f"no image: '{IMAGES}' is missing or empty")
    if len(images) > max_images:
        raise RequestError(413, f"at most {max_images} images a request, found {len(images)}")
    attention = settings.pop(ATTENTION, False)
    if not isinstance(attention, bool):
        raise RequestError(400, f"{ATTENTION}: true or false was expected")
    return CaptionRequest(images, Wish(_search(search, settings), attention))


def _search(search: SearchConfig, changes: Mapping[str, Any]) -> SearchConfig:
    """Return settings of search with some changed, within what the service allows."""
    if not changes:
        return search
    for name, value in changes.items():
        if name not in SETTINGS:
            known = [IMAGES, ATTENTION, *SETTINGS]
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise RequestError(400, f"no field '{name[:100]}'{hint}")
        most = MOST_OF_SEARCH.get(name)
        if most and isinstance(value, int) and value > most:
            raise RequestError(400, f"{name}: at most {most} was expected")
        most = MOST_PHRASES.get(name)
        if most and isinstance(value, list) and len(value) > most:
            raise RequestError(400, f"{name}: at most {most} words and phrases were expected")
    try:
        return parse(SearchConfig, {**asdict(search), **changes}, "settings")
    except ConfigError as error:
        message = str(error).removeprefix("settings: ").replace("search.", "")
        raise RequestError(400, message[:500]) from None


# --- JSON -------------------------------------------------------------------------------------


def _read_json(body: bytes, content_type: str) -> tuple[list[SentImage], dict[str, Any]]:
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # of bytes that aren't UTF-8, too
        raise RequestError(400, "the body isn't JSON") from None
    if not isinstance(content, dict):
        raise RequestError(400, "the body: a JSON object was expected")
    images = content.pop(IMAGES, [])
    if not isinstance(images, list):
        raise RequestError(400, f"{IMAGES}: a list was expected")
    return [_json_image(image, place) for place, image in enumerate(images)], content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} isn't JSON")


def _json_image(image: Any, place: int) -> SentImage:
    """Read an image of a JSON body: its base64, or an object with that and a name."""
    where = f"{IMAGES}[{place}]"
    if isinstance(image, str):
        image = {"data": image}
    if not isinstance(image, dict) or not image.keys() <= {"name", "data"}:
        raise RequestError(400, f"{where}: base64, or an object of name and data was expected")
    name, data = image.get("name", where), image.get("data")
    if not isinstance(name, str) or not isinstance(data, str):
        raise RequestError(400, f"{where}: name and data must be strings")
    try:
        return SentImage(_clean(name), base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError):
        raise RequestError(400, f"{where}: data isn't base64") from None


# --- forms ------------------------------------------------------------------------------------


def _read_form(body: bytes, content_type: str) -> tuple[list[SentImage], dict[str, Any]]:
    boundary = _header(content_type).get_boundary("")
    if not boundary:
        raise RequestError(400, "the form's boundary is missing")
    texts: dict[str, list[bytes]] = {}
    files: dict[str, list[HTTPFile]] = {}
    config = ParseMultipartConfig(max_parts=_MOST_PARTS)
    try:
        parse_multipart_form_data(boundary.encode(), body, texts, files, config=config)
        fields_of = {name: [each.decode() for each in sent] for name, sent in texts.items()}
    except (HTTPInputError, UnicodeError):
        raise RequestError(400, "the form is malformed") from None
    if IMAGES in texts or files.keys() - {IMAGES}:
        raise RequestError(400, f"files were expected in '{IMAGES}' alone, and nothing else there")
    images = [SentImage(_clean(file.filename), file.body) for file in files.get(IMAGES, [])]
    return images, {name: _form_value(name, sent) for name, sent in fields_of.items()}


def _form_value(name: str, sent: list[str]) -> Any:
    """Return what a field's texts mean."""
    if name in MOST_PHRASES:
        return sent
    if len(sent) > 1:
        raise RequestError(400, f"'{name[:100]}' comes {len(sent)} times")
    try:
        return json.loads(sent[0], parse_constant=_refuse_constant)  # a number, true or false
    except (ValueError, RecursionError):
        raise RequestError(400, f"{name[:100]}: a number, true or false was expected") from None


def _header(content_type: str) -> Message:
    message = Message()
    message["Content-Type"] = content_type
    return message


def _clean(name: str) -> str:
    """Return a name as it is sent back: a text, not too long, and never a path."""
    return name.replace("\\", "/").rpartition("/")[2][:_LONGEST_NAME]
