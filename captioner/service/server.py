"""The service behind an address: listening, and an end that loses no request.

It stands on Tornado, which limits while it receives how long a head and a body may take and how
much they may hold. The servers that were looked at beside it (Uvicorn with Starlette or FastAPI)
let a slow sender keep a connection for ever, and spool files of any size to the disk before the
application is asked.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream

from captioner.errors import UsageError
from captioner.service.handlers import LINGER, ServerState, application
from captioner.service.service import CaptionService
from captioner.stopping import StopSignals

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_GRACE = 0.25  # seconds without a request, after which a service that was told to end does
_POLL = 0.05  # seconds
_LONGEST_HEAD = 16 << 10  # bytes
_BACKLOG = 128  # connections that the system lets in before they are looked at


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; port 0 takes any that is free.

    Raises:
        UsageError: It can't be listened on.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise UsageError(f"can't listen on {host}, port {port}: {reason}") from None


class Server:
    """Makes a service reachable.

    Args:
        service: What captions.
        host: The address.
        listener: Of the address: see ``listen``.
        keys: One of these must come with each request but for the page and /health; none lets
            everybody in.
    """

    def __init__(
        self,
        service: CaptionService,
        host: str,
        listener: socket.socket,
        keys: Sequence[str] = (),
    ) -> None:
        encoded = [key.encode() for key in keys]
        self._state = ServerState(service, encoded, LOOPBACK if host in LOOPBACK else ())
        self._host, self._listener, self._settings = host, listener, service.settings

    @property
    def address(self) -> str:
        """Where it is, for a browser."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._listener.getsockname()[1]}"

    async def run(self, signals: StopSignals, ready: Callable[[], object]) -> None:
        """Serve until a signal comes; then answer what was accepted, and return.

        Args:
            signals: Tells when; deferred.
            ready: Called once requests are heard.
        """
        logging.getLogger("tornado").setLevel(logging.ERROR)  # each request has its line already
        server = _LimitedServer(
            application(self._state),
            max_header_size=_LONGEST_HEAD,
            idle_connection_timeout=self._settings.receive_seconds,
            body_timeout=self._settings.receive_seconds + LINGER,  # a handler is first: see there
        )
        server.most = self._settings.max_connections
        self._listener.setblocking(False)
        server.add_socket(self._listener)
        ready()
        while not signals.received:
            await asyncio.sleep(_POLL)
        self._state.is_draining = True
        self._state.service.hurry()
        await asyncio.sleep(_GRACE)  # clients are told meanwhile that their connections end
        server.let_in(self._listener)
        server.stop()
        quiet = 0.0
        while quiet < _GRACE:
            await asyncio.sleep(_POLL)
            quiet = 0.0 if self._state.active else quiet + _POLL
        await server.close_all_connections()


class _LimitedServer(HTTPServer):
    """Closes connections at once that are too many.

    Attributes:
        most: How many may be open.
    """

    most = 0
    _open = 0

    def let_in(self, listener: socket.socket) -> None:
        """Accept all whom the system has let in: closing the listener would cut them off."""
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, address = listener.accept()
                self.handle_stream(IOStream(connection), address)

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        if self._open >= self.most:
            stream.close()
            return
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open += 1
        super().handle_stream(stream, address)

    def on_close(self, server_conn: object) -> None:
        self._open -= 1
        super().on_close(server_conn)
