"""Hostile requests: each is refused with its status, in bounded time and memory, without a word of
what is inside, and the service answers the next."""

import base64
import gzip
import json
import random
import re
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil
import pytest
from hostile_files import bombs, cut_off, foreign, lying_headers, strips
from running import FORM, JSON, Answer, RunningService, form, post, read_all

from captioner.progress import printable

MOST_SECONDS = 20  # for one of them, on a busy machine; usual are milliseconds
MOST_MEMORY = 500  # MiB that the main process takes more at its peak
LARGE = 200 << 20  # bytes
OUR_FILES = re.compile(r"Traceback|\.py|site-packages|checkpoint|/tmp|/home|/root|0x[0-9a-f]{6}")


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    running = RunningService(tmp_path_factory.mktemp("service"), tiny_model)
    yield running
    assert running.stop() == 0


@dataclass(frozen=True)
class HostileRequest:
    """What is sent, and what must come of it.

    Attributes:
        name: What it is.
        status: Of the answer; 0 where the connection is closed without one.
        data: What is sent over the wire, piece by piece.
        error: What the answer says, or begins with.
    """

    name: str
    status: int
    data: Iterable[bytes]
    error: str = ""


def head(
    method: str = "POST",
    path: str = "/caption",
    host: str = "Host: localhost",
    **headers: object,
) -> bytes:
    """Return a request's head; a header's ``_`` is ``-``."""
    lines = [host] if host else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return f"{method} {path} HTTP/1.1\r\n".encode() + "".join(f"{x}\r\n" for x in lines).encode()


def of_json(content: object) -> list[bytes]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return [post(body, JSON)]


@pytest.fixture(scope="module")
def image(drawn) -> bytes:
    return drawn.paths[0].read_bytes()


def bad_json(image: bytes) -> Iterator[HostileRequest]:
    """Bodies that aren't what JSON must be, or what it must say."""
    data = base64.b64encode(image).decode()
    one = {"images": [data]}
    for name, body in (
        *(("nothing", b""), ("half an object", b'{"images": ['), ("no UTF-8", b'{"a": "\xff"}')),
        *(("NaN", json.dumps({"length_penalty": float("nan")}).encode()), ("a comma", b"{,}")),
        *(("Infinity", b'{"temperature": Infinity}'), ("deep", b"[" * 200_000)),
        *(("a huge integer", b'{"seed": ' + b"9" * 10_000 + b"}"), ("a form", form())),
        ("zeros", bytes(100_000)),
    ):
        yield HostileRequest(f"JSON: {name}", 400, of_json(body), "the body isn't JSON")
    for name, content, error in (
        *(("a list", [], "the body: a JSON object"), ("null", None, "the body: a JSON object")),
        *(("no images", {}, "no image"), ("empty", {"images": []}, "no image")),
        *(("a number", {"images": 5}, "images: a list"), ("numbers", {"images": [5]}, "images[0]")),
        ("a text for images", {"images": data}, "images: a list was expected"),
        ("an address", {"images": [{"url": "http://169.254.169.254/"}]}, "images[0]: base64"),
        ("an address as data", {"images": ["http://localhost/a.jpg"]}, "images[0]: data isn't"),
        ("a path", {"images": [{"path": "/etc/passwd"}]}, "images[0]: base64"),
        ("a path as data", {"images": ["/etc/passwd"]}, "images[0]: data isn't base64"),
        ("a data URL", {"images": [f"data:image/png;base64,{data}"]}, "images[0]: data isn't"),
        ("half base64", {"images": [data[:-3]]}, "images[0]: data isn't base64"),
        ("a name that is none", {"images": [{"name": 5, "data": data}]}, "images[0]: name and"),
        ("an unknown field", one | {"beamsize": 3}, "no field 'beamsize'; did you mean"),
        ("a field of Python", one | {"__class__": 3}, "no field '__class__'"),
        ("a long field", one | {"x" * 10_000: 3}, "no field 'xxx"),
        ("attention", one | {"attention": "yes"}, "attention: true or false was expected"),
    ):
        yield HostileRequest(f"JSON: {name}", 400, of_json(content), error)
    many = {"images": [data] * 17}
    yield HostileRequest("JSON: many images", 413, of_json(many), "at most 16 images a request")
    yield HostileRequest("JSON: no image", 422, of_json({"images": [""]}), "images[0]: not a")


def bad_settings(image: bytes) -> Iterator[HostileRequest]:
    """Settings that no search can or may have."""
    for name, value, error in (
        *(("beam_size", 0, "beam_size: at least 1"), ("beam_size", -5, "beam_size: at least 1")),
        *(("beam_size", 21, "beam_size: at most 20"), ("beam_size", 10**30, "beam_size: at most")),
        *(("beam_size", "3", "beam_size"), ("beam_size", True, "beam_size")),
        *(("beam_size", 2.5, "beam_size"), ("beam_size", None, "beam_size")),
        *(("beam_size", [3], "beam_size"), ("n_best", 6, "n_best: at most")),
        *(
            ("max_length", 1000, "max_length: at most 50"),
            ("min_length", 30, "min_length: at most"),
        ),
        *(("samples", 10_000, "samples: at most 20"), ("seed", 2**64, "seed")),
        *(("length_penalty", 1e308, "length_penalty: at most"), ("top_p", 0, "top_p")),
        *(("forced", "dog", "forced"), ("forced", ["red"] * 6, "forced: at most 5")),
        ("forced", ["red " * 45, "red blue " * 12], "forced: at most 65 words at beam_size=3"),
        *(("forced", ["zebra"], "forced: 'zebra' can't"), ("forced", [""], "forced: a word")),
        *(("forced", [5], "forced"), ("forbidden", ["x" * 201], "forbidden: a phrase has more")),
        *(("forbidden", ["x"] * 101, "forbidden: at most 100"), ("groups", 2, "groups")),
        *(("no_repeat_word", 1, "no_repeat_word"), ("top_k", 5, "top_k has no effect")),
    ):
        content = {"images": [base64.b64encode(image).decode()], name: value}
        title = f"{name}: {str(value)[:20]}"
        yield HostileRequest(title, 400, of_json(content), error)
    infinite = b'{"images": ["' + base64.b64encode(image) + b'"], "temperature": 1e999}'
    yield HostileRequest("temperature: 1e999", 400, of_json(infinite), "temperature")


def bad_forms(image: bytes) -> Iterator[HostileRequest]:
    """Forms that are broken, or hold what they mustn't."""
    good = form(("images", "a.png", image))
    no_form = "the form is malformed"
    for name, body, error in (
        *(
            ("empty", b"", no_form),
            ("cut off", good[:-30], no_form),
            ("zeros", bytes(999), no_form),
        ),
        ("without a name", good.replace(b' name="images";', b""), no_form),
        ("not of a form", good.replace(b"form-data", b"attachment"), no_form),
        ("without a head", good.replace(b"\r\n\r\n", b"\r\n"), no_form),
        ("a head of 20 kB", good.replace(b"a.png", b"a" * 20_000), no_form),
        ("2,000 parts", form(*[("n_best", None, b"1")] * 2000), no_form),
        ("no UTF-8", form(("n_best", None, b"\xff\xfe")), no_form),
        ("no file", form(("n_best", None, b"2")), "no image"),
        ("another field's file", form(("file", "a.png", image)), "files were expected in 'images'"),
        ("a text for images", form(("images", None, image[:0])), "files were expected in 'images'"),
        ("a setting twice", form(*[("n_best", None, b"1")] * 2), "'n_best' comes 2"),
        ("a setting that is none", form(("n_best", None, b"abc")), "n_best: a number"),
        ("NaN", form(("length_penalty", None, b"NaN")), "length_penalty: a number"),
    ):
        yield HostileRequest(f"form: {name}", 400, [post(body)], error)
    for kind, status, error in (
        *(
            ("text/plain", 415, "a body of"),
            ("", 415, "a body of"),
            ("image/png", 415, "a body of"),
        ),
        *(("application/x-www-form-urlencoded", 415, "a body of"), ("\x80/\xff", 415, "a body of")),
        ("multipart/form-data", 400, "the form's boundary is missing"),
        ("multipart/form-data; boundary=other", 400, no_form),
        ("multipart/form-data; boundary*=x'y'z", 400, no_form),
        ("multipart/mixed; boundary=----a-boundary", 415, "a body of"),
    ):
        data = post(good, {"Content-Type": kind})
        yield HostileRequest(f"type: {kind}", status, [data], error)
    packed = post(gzip.compress(good), FORM, Content_Encoding="gzip")
    yield HostileRequest("a packed form", 400, [packed.replace(b"_", b"-", 1)], no_form)


def bad_heads(image: bytes) -> Iterator[HostileRequest]:
    """Methods, addresses and heads."""
    length = {"Content_Length": len(image)}
    for method, path, status in (
        *(("GET", "/caption", 405), ("PUT", "/caption", 405), ("DELETE", "/caption", 405)),
        *(("TRACE", "/caption", 405), ("BREW", "/caption", 405), ("POST", "/", 405)),
        *(("POST", "/health", 405), ("POST", "/../../etc/passwd", 404), ("GET", "/caption/", 404)),
        *(("GET", "//health", 404), ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404)),
        *(("GET", "/page.html", 404), ("GET", "/static/../server.py", 404), ("GET", "*", 404)),
        ("GET", "/" + "a" * 8000, 404),
    ):
        data = head(method, path, Connection="close") + b"\r\n"
        yield HostileRequest(f"{method} {path[:30]}", status, [data])
    for name, status, data in (
        ("another site's page", 403, head(Origin="http://evil.example", **length)),
        ("a page of no site", 403, head(Origin="null", **length)),
        ("another name for this machine", 403, head(host="Host: evil.example", **length)),
        ("a broken name", 403, head(host="Host: [::1", **length)),
        ("no host", 400, head(host="", **length)),
        ("a length below 0", 400, head(Content_Type="application/json", Content_Length=-5)),
        ("a length that is none", 400, head(Content_Type="application/json", Content_Length="x")),
        ("a length of 10 ** 4000", 413, head(Content_Length="9" * 4000)),
        (
            "two lengths",
            400,
            head(Content_Type="application/json", Content_Length=5) + b"Content-Length: 6\r\n",
        ),
        (
            "both kinds of length",
            400,
            head(Content_Type="application/json", Transfer_Encoding="chunked", **length),
        ),
        ("another coding", 400, head(Content_Type="application/json", Transfer_Encoding="gzip")),
        ("a head of 100 kB", 0, head(X="y" * 100_000)),
        ("100,000 headers", 0, head() + b"a: b\r\n" * 100_000),
        ("no HTTP", 400, b"hello"),
        ("TLS", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)),
        ("another HTTP", 400, b"GET /health HTTP/9.9"),
    ):
        yield HostileRequest(name, status, [data + b"\r\n\r\n"[: 2 if data[-1:] == b"\n" else 4]])


def large_bodies() -> Iterator[HostileRequest]:
    """200 MB, of what was announced and of what wasn't."""
    block = bytes(1 << 20)
    announced = head(Content_Type="application/json", Content_Length=LARGE) + b"\r\n"
    several = [block] * (LARGE >> 20)
    yield HostileRequest("200 MB", 413, [announced, *several], "a body of at most 33554432 bytes")
    chunks = [b"100000\r\n" + block + b"\r\n"] * (LARGE >> 20)
    unknown = head(Content_Type="application/json", Transfer_Encoding="chunked") + b"\r\n"
    yield HostileRequest("200 MB in chunks", 413, [unknown, *chunks], "a body of at most")
    yield HostileRequest("no chunk", 400, [unknown, b"hello\r\n\r\n"])
    text = head("GET", "/health", Content_Length=LARGE) + b"\r\n"
    yield HostileRequest(
        "200 MB that nobody asked for", 413, [text, *several], "a body of at most 0"
    )


GROUPS = (bad_json, bad_settings, bad_forms, bad_heads)


def exchange(service: RunningService, data: Iterable[bytes]) -> Answer:
    """Send, as long as it is taken; return what came, with status 0 where nothing did."""
    connection = socket.create_connection(service.address, timeout=MOST_SECONDS)
    try:
        for piece in data:
            connection.sendall(piece)
    except OSError:  # refused in the midst of it
        pass
    received = read_answer_bytes(connection)
    if not received:
        return Answer(0, {}, b"")
    top, _, body = received.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    return Answer(int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body)


def read_answer_bytes(connection: socket.socket) -> bytes:
    """Return one answer, or what comes before the connection is closed."""
    received = b""
    try:
        while data := connection.recv(1 << 16):
            received += data
            top, end, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", top)
            if end and length and len(body) >= int(length[1]):
                break
    except ConnectionResetError:
        pass
    connection.close()
    return received


def problem(request: HostileRequest, answer: Answer, seconds: float) -> str:
    """Return what is wrong with an answer; "" where nothing is."""
    if answer.status != request.status:
        return f"{answer.status} {answer.body[:200]!r}"
    if seconds > MOST_SECONDS:
        return f"{seconds:.1f} s"
    text = answer.body.decode()
    if OUR_FILES.search(text):
        return text
    if not answer.body:  # of a head that no handler has seen
        return "" if request.status in (0, 400) and not request.error else "no reason"
    error = answer.json["error"]
    right = set(answer.json) == {"error"} and text.count("\n") == 1 and len(text) < 1000
    return "" if right and error.startswith(request.error) else text


def test_hostile_requests(service, image, drawn):
    """One test, so that what each leaves behind meets all others."""
    requests = [request for group in GROUPS for request in group(image)] + [*large_bodies()]
    assert len(requests) >= 100
    assert len({request.name for request in requests}) == len(requests)
    peak = service.peak_memory()
    problems = {}
    for request in requests:
        started = time.monotonic()
        answer = exchange(service, request.data)
        problems[request.name] = problem(request, answer, time.monotonic() - started)
    assert not {name: text for name, text in problems.items() if text}
    assert service.peak_memory() - peak < MOST_MEMORY
    check_it_works(service, drawn)
    check_names(service, image)
    check_noise(service, image)
    check_it_works(service, drawn)
    check_that_nothing_is_left_open(service)


def check_it_works(service, drawn) -> None:
    for path in drawn.paths[:2]:
        answer = service.caption(path)
        assert answer.json["images"][0]["captions"][0]["text"] == drawn.captions[path.name]
    assert service.health() == {"status": "ok", "waiting_images": 0}


def check_names(service, image) -> None:
    """They are nothing but text."""
    script = "<script>alert(1)</script>"
    for sent, told in (
        ("../../../etc/passwd", "passwd"),
        ("/etc/shadow", "shadow"),
        ("C:\\Windows\\system.ini", "system.ini"),
        ("..", ".."),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
        (script, "script>"),
        ("a\u202egnp.exe", "a\u202egnp.exe"),
        ("a" * 1000, "a" * 255),
        ("null\0byte", "null\0byte"),
        ("file:///etc/passwd", "passwd"),
    ):
        content = {"images": [{"name": sent, "data": base64.b64encode(image).decode()}]}
        answer = service.ask("POST", "/caption", json.dumps(content).encode(), JSON)
        assert answer.status == 200
        assert answer.json["images"][0]["name"] == told
        assert (answer.headers["Content-Type"], answer.headers["X-Content-Type-Options"]) == (
            "application/json",
            "nosniff",
        )
    assert script not in service.errors.read_text()


def test_hostile_images(service, drawn):
    """What no reader of images should trust, one after the other and many at a time."""
    files = [each for group in (strips, bombs, lying_headers, cut_off, foreign) for each in group()]
    assert len(files) >= 60
    peak = service.peak_memory()
    problems = {}
    for file in files:
        started = time.monotonic()
        answer = service.ask("POST", "/caption", form(("images", "x", file.content)), FORM)
        seconds = time.monotonic() - started
        text = answer.body.decode()
        if file.reason:
            right = answer.status == 422 and answer.json["error"].startswith("x: ")
        else:  # what is decoded is less than for a folder
            right = answer.status == 200 or "megapixels are too many; scale it down" in text
        if not right or seconds > MOST_SECONDS or OUR_FILES.search(text) or "CAPTIONER" in text:
            problems[file.name] = f"{seconds:.1f} s {text[:200]}"
    assert not problems
    assert service.peak_memory() - peak < MOST_MEMORY
    for decoder in service.decoders():
        assert decoder.memory_info().rss < 2000 << 20
    check_it_works(service, drawn)


def check_noise(service, image) -> None:
    """Requests with some bytes changed or cut out, at random: of the body, or anywhere."""
    rng = random.Random(0)
    body = form(("images", "a.png", image), ("n_best", None, b"2"))
    for number in range(300):
        in_body = number % 2
        data = bytearray(body if in_body else post(body))
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        start = rng.randrange(len(data))
        if rng.random() < 0.3:
            del data[start : start + rng.randrange(50)]
        connection = service.begin(post(bytes(data)) if in_body else bytes(data))
        if in_body:
            received = read_answer_bytes(connection)
            assert received.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4")), data
        else:
            connection.shutdown(socket.SHUT_WR)
            received = read_all(connection)
        assert not OUR_FILES.search(received.decode("latin1"))
    assert "Traceback" not in service.errors.read_text()


def check_that_nothing_is_left_open(service) -> None:
    process = psutil.Process(service.process.pid)
    assert process.num_fds() < 100
    assert process.num_threads() < 60
    lines = service.errors.read_text().splitlines()
    assert [printable(line) for line in lines] == lines
