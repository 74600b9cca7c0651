"""What is answered in HTTP: who may ask, how much they may send, and what each address says."""

import asyncio
import hmac
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tornado.http1connection import HTTP1Connection
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

from captioner.errors import CaptionerError, RequestError
from captioner.progress import log_line
from captioner.service.metrics import Metrics
from captioner.service.openapi import description
from captioner.service.page import read_page
from captioner.service.requests import media_type
from captioner.service.service import CaptionService

LINGER = 2.0  # seconds that a refused client may go on sending, so that it reads why
CLIENT_GONE = 499  # as nginx calls it
_ANY_LENGTH = 1 << 62
_LONGEST_LENGTH = 15  # digits


@dataclass
class ServerState:
    """What all requests of a server share.

    Attributes:
        service: What captions.
        keys: One of these must come with a request; none lets everybody in.
        hosts: Names by which the server must be called where it has no key: another site's name,
            made to mean this machine, would let that site's pages read answers. None allows all.
        is_draining: Whether it answers what is there, and ends.
        active: Requests that aren't answered yet.
        held: Bytes of bodies that are being received or read.
    """

    service: CaptionService
    keys: Sequence[bytes]
    hosts: Sequence[str]
    is_draining: bool = False
    active: int = 0
    held: int = 0


def application(state: ServerState) -> Application:
    """Return all that the server answers."""
    handlers = {
        "/": PageHandler,
        "/caption": CaptionHandler,
        "/health": HealthHandler,
        "/metrics": MetricsHandler,
        "/openapi.json": DescriptionHandler,
    }
    return Application(
        [(path, handler, {"state": state}) for path, handler in handlers.items()],
        default_handler_class=UnknownHandler,
        default_handler_args={"state": state},
        log_function=lambda handler: None,  # see _Handler._count
    )


@stream_request_body
class _Handler(RequestHandler, ABC):
    """What all answers share: the checks before a body is received, and the line in the log.

    Attributes:
        method: The one that is taken; with GET also HEAD.
        is_open: Whether no key is needed.
        most_bytes: Of a body.
    """

    method = "GET"
    is_open = False
    most_bytes = 0

    def initialize(self, state: ServerState) -> None:
        self.state, self._started = state, time.monotonic()
        self.body, self.images = bytearray(), 0
        self._is_received = self._is_refused = self._is_counted = False
        self._timer: asyncio.TimerHandle | None = None
        state.active += 1

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Type", "application/json")

    # --- before the body ----------------------------------------------------------------------

    def prepare(self) -> None:
        """Refuse what can be refused by its head."""
        self.connection.set_max_body_size(_ANY_LENGTH)  # counted here, where it is told why
        seconds = self.state.service.settings.receive_seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._end_slow_sender)
        try:
            self._check_sender()
            self.check()
        except RequestError as error:
            self.refuse(error)

    def check(self) -> None:
        """Raise a RequestError for what isn't taken here."""
        if self.request.method not in (self.method, "HEAD" if self.method == "GET" else ""):
            raise RequestError(405, f"{self.method} was expected")
        length = self.request.headers.get("Content-Length", "")
        if length.isdecimal() and (len(length) > _LONGEST_LENGTH or int(length) > self.most_bytes):
            raise self._too_long()

    def _too_long(self) -> RequestError:
        return RequestError(413, f"a body of at most {self.most_bytes} bytes was expected")

    def _check_sender(self) -> None:
        """Refuse other sites' pages, and those without a key."""
        host, origin = self.request.host, self.request.headers.get("Origin")
        if origin and origin.partition("://")[2] != host:
            raise RequestError(403, "pages of other sites may not ask")
        if self.is_open:
            return
        if self.state.keys:
            self._check_key()
        elif self.state.hosts and _hostname(host) not in self.state.hosts:
            raise RequestError(403, "under this name an API key is needed, and none is set up")

    def _check_key(self) -> None:
        scheme, _, given = self.request.headers.get("Authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.encode(), key) for key in self.state.keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestError(401, "an API key is needed: Authorization: Bearer KEY")

    # --- the body -----------------------------------------------------------------------------

    def data_received(self, chunk: bytes) -> None:
        """Keep a part of the body, unless it is too much."""
        if self._is_refused:
            return
        self.body += chunk
        self.state.held += len(chunk)
        if len(self.body) > self.most_bytes:
            self.refuse(self._too_long())
        elif self.state.held > self.state.service.settings.bodies_bytes:
            self.refuse(RequestError(503, "too much is being sent at once; try again"))

    def _end_slow_sender(self) -> None:
        seconds = self.state.service.settings.receive_seconds
        self.refuse(RequestError(408, f"the request took more than {seconds:g} seconds to come"))

    def _release_body(self) -> None:
        self.state.held -= len(self.body)
        self.body = bytearray()

    # --- the answer ---------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        self._is_received = True
        self._end_timer()
        if self._is_refused:
            self._end_refused()
        else:
            await self.respond()

    get = head = post = put = patch = delete = options = _dispatch

    @abstractmethod
    async def respond(self) -> None:
        """Answer, once the body is there."""

    @property
    def connection(self) -> HTTP1Connection:
        """What the request came by."""
        assert isinstance(self.request.connection, HTTP1Connection)
        return self.request.connection

    def answer(self, content: Any) -> None:
        """Send JSON, one line of it."""
        self.send(json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n")

    def send(self, content: bytes) -> None:
        """Send this; a client that doesn't take it in time is cut off."""
        if self.state.is_draining:
            self.set_header("Connection", "close")
        connection = self.connection
        sent = self.finish(content)
        if not sent.done():
            seconds = self.state.service.settings.receive_seconds
            timer = asyncio.get_running_loop().call_later(seconds, connection.close)
            sent.add_done_callback(lambda sent: timer.cancel() or sent.exception())  # type: ignore

    def refuse(self, error: RequestError) -> None:
        """Send why not, though the body may still be on its way.

        What comes of it is thrown away for a moment: a connection that is closed while its client
        still sends is reset, and the client never reads the answer.
        """
        if self._is_refused or self._finished:
            return
        self._is_refused = True
        self._end_timer()
        self._release_body()
        self.set_status(error.status)
        if error.status == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        elif error.status == 405:
            self.set_header("Allow", self.method)
        elif error.status == 503:
            self.set_header("Retry-After", self.state.service.retry_after)
        line = json.dumps({"error": str(error)}).encode() + b"\n"
        if self._is_received:
            self.send(line)
            return
        self.set_header("Connection", "close")
        self.set_header("Content-Length", len(line))
        self.write(line)
        self.connection.set_body_timeout(LINGER)
        length = self.request.headers.get("Content-Length", "")
        if "Expect" in self.request.headers or len(length) > _LONGEST_LENGTH:
            self.finish()  # nothing comes before this answer, or what no client sends
        else:
            self.flush().add_done_callback(lambda sent: sent.exception())
            asyncio.get_running_loop().call_later(LINGER, self._end_refused)

    def _end_refused(self) -> None:
        if not self._finished:
            self.finish()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Send an error of Tornado's own, such as a method that HTTP doesn't know, or of a bug."""
        is_method = status_code == 405
        self.answer({"error": f"{self.method} was expected" if is_method else "internal error"})

    def log_exception(self, kind: Any, error: Any, trace: Any) -> None:
        """Write the traceback of a bug alone."""
        if not isinstance(error, HTTPError):
            super().log_exception(kind, error, trace)

    # --- the end ------------------------------------------------------------------------------

    def on_connection_close(self) -> None:
        """Count a client that is gone before it was answered."""
        if not self._is_refused:
            self.set_status(CLIENT_GONE, "Client Gone")
        self._count()

    def on_finish(self) -> None:
        """Count an answer."""
        self._count()

    def _end_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _count(self) -> None:
        """Count the request once, and write its line."""
        if self._is_counted:
            return
        self._is_counted = True
        self._end_timer()
        self._release_body()
        self.state.active -= 1
        seconds, status, request = time.monotonic() - self._started, self.get_status(), self.request
        method = request.method if request.method in self.SUPPORTED_METHODS else "other"
        path = "other" if isinstance(self, UnknownHandler) else request.path
        metrics = self.state.service.metrics
        metrics.requests.labels(path, method, status).inc()
        metrics.seconds.labels(path).observe(seconds)
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        asked = f"{request.method} {request.path}"[:100]
        images = f" {self.images} images" if self.images else ""
        log_line(f"{when} {request.remote_ip} {asked} {status}{images} {1000 * seconds:.1f} ms")


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class CaptionHandler(_Handler):
    """``POST /caption``."""

    method = "POST"

    def initialize(self, state: ServerState) -> None:
        """Take as much as the settings allow."""
        super().initialize(state)
        self.most_bytes = state.service.settings.body_bytes
        self._task: asyncio.Task[list[dict[str, Any]]] | None = None

    def check(self) -> None:
        """Refuse other kinds of body, and what there is no room for."""
        super().check()
        media_type(self.request.headers.get("Content-Type", ""))
        if self.state.service.is_full:
            raise self.state.service.full_error()

    async def respond(self) -> None:
        """Caption what was sent."""
        self._task = asyncio.ensure_future(self._caption())
        try:
            results = await self._task
        except asyncio.CancelledError:
            if not self._task.cancelled():
                raise
        except RequestError as error:
            self.refuse(error)
        except CaptionerError as error:
            self.refuse(RequestError(400, str(error).replace("search.", "")))
        else:
            self.answer({"images": results})

    async def _caption(self) -> list[dict[str, Any]]:
        content_type = self.request.headers.get("Content-Type", "")
        request = await self.state.service.read(bytes(self.body), content_type)
        self._release_body()
        self.images = len(request.images)
        return await self.state.service.caption(request)

    def on_connection_close(self) -> None:
        """Take the images out again."""
        if self._task:
            self._task.cancel()
        super().on_connection_close()


class HealthHandler(_Handler):
    """``GET /health``."""

    is_open = True

    async def respond(self) -> None:
        """Tell whether it serves; 503 tells a load balancer to send nobody any longer."""
        if self.state.is_draining:
            self.set_status(503)
        state = "ending" if self.state.is_draining else "ok"
        self.answer({"status": state, "waiting_images": self.state.service.waiting})


class MetricsHandler(_Handler):
    """``GET /metrics``."""

    async def respond(self) -> None:
        """Tell what was counted, in Prometheus's text format."""
        self.set_header("Content-Type", Metrics.CONTENT_TYPE)
        self.send(self.state.service.metrics.text())


class DescriptionHandler(_Handler):
    """``GET /openapi.json``."""

    async def respond(self) -> None:
        """Tell what can be asked."""
        service = self.state.service
        self.answer(description(service.settings, service.search))


class PageHandler(_Handler):
    """``GET /``: the page, which holds nothing of the service's."""

    is_open = True

    async def respond(self) -> None:
        """Send the page."""
        page = read_page()
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Content-Security-Policy", page.policy)
        self.set_header("Referrer-Policy", "no-referrer")
        self.send(page.content)


class UnknownHandler(_Handler):
    """Any other address."""

    def check(self) -> None:
        """Refuse."""
        raise RequestError(404, "there are /, /caption, /health, /metrics and /openapi.json")

    async def respond(self) -> None:
        """Do nothing: ``check`` has refused."""
