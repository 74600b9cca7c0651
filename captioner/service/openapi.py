"""What can be asked of the service, as an OpenAPI description."""

from dataclasses import asdict
from typing import Any, get_type_hints

from captioner.config import SearchConfig
from captioner.experiment_file import attribute_docs
from captioner.service.requests import ATTENTION, FORM, IMAGES, JSON
from captioner.service.settings import MOST_OF_SEARCH, MOST_PHRASES, ServiceConfig
from captioner.version import __version__

Schema = dict[str, Any]

_TYPES = {int: "integer", float: "number", bool: "boolean"}
_PNG = (  # a red dot
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
_RESULT = {
    "name": "dog.jpg",
    "width": 500,
    "height": 375,
    "captions": [
        {"text": "a dog runs through the snow", "log_probability": -6.2, "score": -1.4},
        {"text": "a dog is running in the snow", "log_probability": -6.5, "score": -1.5},
    ],
}
_STATUSES = {
    "400": "the body or a setting is wrong",
    "401": "the API key is missing or wrong",
    "403": "a page of another site asks",
    "408": "the body took too long to come",
    "413": "the body is too long, or has too many images",
    "415": "neither a form nor JSON",
    "422": "none of the images can be captioned",
    "503": "too much is waiting; Retry-After tells for how many seconds",
}


def description(settings: ServiceConfig, search: SearchConfig) -> Schema:
    """Return the description.

    Args:
        settings: What the service allows.
        search: The settings that hold where a client names no others.
    """
    error = _object({"error": {"type": "string"}})
    refusals = {status: _answer(text, error, {"error": text}) for status, text in _STATUSES.items()}
    caption = {
        "summary": "Caption images",
        "requestBody": {"required": True, "content": _bodies(settings, search)},
        "responses": {
            "200": _answer("for each image its captions, or an error", _answer_schema(), _ANSWER),
            **refusals,
        },
    }
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "captioner", "version": __version__},
        "security": [{}, {"key": []}],
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/caption": {"post": caption},
            "/health": {
                "get": {
                    "summary": "Whether it serves; needs no key",
                    "security": [{}],
                    "responses": {
                        "200": _answer("it serves", _HEALTH, {"status": "ok", "waiting_images": 0}),
                        "503": _answer("it ends", _HEALTH, {"status": "ending"}),
                    },
                }
            },
            "/metrics": {
                "get": {
                    "summary": "What was counted, for Prometheus",
                    "responses": {"200": {"description": "numbers", "content": text}},
                }
            },
        },
    }


def _object(properties: Schema, **more: Any) -> Schema:
    return {"type": "object", "properties": properties, **more}


_HEALTH = _object({"status": {"type": "string"}, "waiting_images": {"type": "integer"}})
_ANSWER = {IMAGES: [_RESULT, {"name": "bad.jpg", "error": "not a readable image"}]}


def _answer(text: str, schema: Schema, example: Any) -> Schema:
    return {"description": text, "content": {JSON: {"schema": schema, "example": example}}}


def _bodies(settings: ServiceConfig, search: SearchConfig) -> Schema:
    """Return what a form and a JSON body may hold."""
    properties = {name: _setting(name, value) for name, value in asdict(search).items()}
    properties[ATTENTION] = {
        "type": "boolean",
        "default": False,
        "description": "Tell what the decoder looked at for each word.",
    }
    data = {"type": "string", "contentEncoding": "base64"}
    image = {"oneOf": [data, _object({"name": {"type": "string"}, "data": data})]}
    file = {"type": "string", "contentMediaType": "image/*"}
    many = {"type": "array", "minItems": 1, "maxItems": settings.max_images}
    bodies = {}
    for kind, item in ((FORM, file), (JSON, image)):
        images = {IMAGES: many | {"items": item}}
        schema = _object(images | properties, required=[IMAGES], additionalProperties=False)
        bodies[kind] = {"schema": schema}
    bodies[JSON]["example"] = {IMAGES: [{"name": "dot.png", "data": _PNG}], "n_best": 2}
    return bodies


def _setting(name: str, default: Any) -> Schema:
    """Return what a setting of search may be."""
    kind = get_type_hints(SearchConfig)[name]
    schema: Schema = {"description": attribute_docs(SearchConfig)[name], "default": default}
    if name in MOST_PHRASES:
        return schema | {
            "type": "array",
            "maxItems": MOST_PHRASES[name],
            "items": {"type": "string", "maxLength": 200},
        }
    if name in MOST_OF_SEARCH:
        schema["maximum"] = MOST_OF_SEARCH[name]
    return schema | {"type": _TYPES[kind]}


def _answer_schema() -> Schema:
    """Return the form of an answer."""
    number = {"type": ["number", "null"]}
    integers = {"type": "array", "items": {"type": "integer"}}
    maps = _object(
        {
            "words": {"type": "array", "items": {"type": "string"}},
            "size": integers | {"description": "Rows and columns of a map."},
            "maps": {
                "type": "array",
                "items": integers,
                "description": "For each word its map, row by row, from 0 to 255.",
            },
            "cut": {
                "type": "number",
                "description": "Side of the middle square that the maps lie over, as a part of the "
                "shorter side; 0 for the whole image.",
            },
        },
        type=["object", "null"],
    )
    caption = _object(
        {
            "text": {"type": "string"},
            "log_probability": number | {"description": "The model's own."},
            "score": number | {"description": "What captions are ranked by."},
            ATTENTION: maps,
        },
        required=["text", "log_probability", "score"],
    )
    side = {"type": "integer", "description": "In pixels, as the image is seen."}
    image = _object(
        {
            "name": {"type": "string"},
            "width": side,
            "height": side,
            "captions": {"type": "array", "items": caption, "description": "Best first."},
            "error": {"type": "string", "description": "In place of the three before it."},
        },
        required=["name"],
    )
    return _object({IMAGES: {"type": "array", "items": image}}, required=[IMAGES])
