"""A service in a process of its own, and clients of it that also send what no library would."""

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import save_checkpoint

COMMAND = "import sys; from captioner.commands import main; sys.exit(main())"
BOUNDARY = "----a-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class RunningService:
    """``captioner serve`` as a user starts it.

    Attributes:
        process: The service.
        errors: A file with what it has written to standard error.
        address: Where it is: host and port.
    """

    def __init__(self, folder: Path, model: CaptioningModel, *options: object) -> None:
        checkpoint, self.errors = folder / "checkpoint", folder / "errors.txt"
        checkpoint.mkdir()
        save_checkpoint(model, checkpoint, {"BLEU-4": 1.0})
        words = [checkpoint, "--port", 0, "--device", "cpu", "--precision", "float32", *options]
        with self.errors.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "serve", *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), self.errors.read_text()
        url = urlsplit(line.split()[-1])
        self.address = (str(url.hostname), int(url.port or 0))

    def stop(self) -> int:
        """Tell it to end; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        if self.process.stdout:
            self.process.stdout.close()
        return code

    def close(self) -> None:
        """Tell it to end, and see to it that it does so well."""
        assert self.stop() == 0

    def decoders(self) -> list[psutil.Process]:
        """Return the processes that decode images."""
        return self._workers("decoder")

    def models(self) -> list[psutil.Process]:
        """Return the processes that run the model."""
        return self._workers("model")

    def _workers(self, name: str) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        workers = [worker for child in children for worker in child.children()]
        return [worker for worker in workers if worker.name() == name]

    def peak_memory(self) -> int:
        """Return the most memory that its main process has taken, in MiB; 0 if that isn't told."""
        if sys.platform != "linux":
            return 0
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) // 1024

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request, and return the answer."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def caption(self, *images: Path, **settings: Any) -> Answer:
        """Have images captioned, sent as JSON."""
        sent = [
            {"name": path.name, "data": base64.b64encode(path.read_bytes()).decode()}
            for path in images
        ]
        body = json.dumps({"images": sent, **settings}).encode()
        return self.ask("POST", "/caption", body, JSON)

    def begin(self, data: bytes) -> socket.socket:
        """Send bytes over a connection of their own, and leave it open."""
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(data)
        return connection

    def health(self) -> dict[str, Any]:
        return self.ask("GET", "/health").json


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    """Return a form's body; a part is a field's name, a file's name or None, and the content."""
    body = b""
    for name, file, content in parts:
        of_file = "" if file is None else f'; filename="{file}"'
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{of_file}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def post(body: bytes, headers: Mapping[str, str] = FORM, **more: str) -> bytes:
    """Return a whole request for captions, as it goes over the wire."""
    lines = {"Host": "localhost", "Content-Length": str(len(body)), **headers, **more}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST /caption HTTP/1.1\r\n{head}\r\n".encode() + body


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the connection is closed."""
    received = b""
    try:
        while data := connection.recv(1 << 16):
            received += data
    except ConnectionResetError:
        pass
    connection.close()
    return received


def read_answer(connection: socket.socket) -> Answer:
    """Return the answer that comes over a connection, and close it."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    result = Answer(answer.status, answer.headers, answer.read())
    answer.close()
    connection.close()
    return result
