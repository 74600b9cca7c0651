"""The service: captions as Python's, in batches; its queue, its keys, its limits, and its end."""

import contextlib
import http.client
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from running import FORM, JSON, RunningService, form, post, read_all, read_answer, wait_until

from captioner.commands import serve
from captioner.errors import ConfigError
from captioner.service.settings import ServiceConfig

SETTINGS = (
    {},
    {"beam_size": 1},
    {"beam_size": 5, "n_best": 5},
    {"beam_size": 4, "n_best": 2, "length_penalty": 0.0},
    {"min_length": 4, "no_repeat_word": True},
    {"max_length": 2},
    {"forced": ["blue"]},
    {"forbidden": ["red", "bright green"], "n_best": 3},
    {"samples": 4, "n_best": 4, "seed": 3, "top_p": 0.9},
    {"beam_size": 4, "groups": 2, "n_best": 2},
)


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    """One that isn't told anything but where the checkpoint is."""
    running = RunningService(tmp_path_factory.mktemp("service"), tiny_model)
    yield running
    assert running.stop() == 0


# --- captions ---------------------------------------------------------------------------------


def test_captions_in_mixed_batches_are_those_of_python_one_by_one(service, captioner, drawn):
    """All images at all settings, from 20 clients at a time."""
    jobs = [(path, settings) for path in drawn.paths for settings in SETTINGS]
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(lambda job: service.caption(job[0], **job[1]), jobs))
    for (path, settings), answer in zip(jobs, answers, strict=True):
        assert answer.status == 200, answer.body
        (image,) = answer.json["images"]
        expected = captioner.describe(path, **settings)
        told = [(each["text"], each["log_probability"]) for each in image["captions"]]
        assert [text for text, _ in told] == [each.text for each in expected], (path, settings)
        for (_, number), caption in zip(told, expected, strict=True):
            assert number == pytest.approx(caption.log_probability, abs=1e-3)
    numbers = service.ask("GET", "/metrics").body.decode()
    batches = float(re.search(r"captioner_batch_images_count (\S+)", numbers)[1])
    assert batches < len(jobs) / 2  # they were captioned together


def texts_of(answer) -> list[list[str]]:
    return [[each["text"] for each in image["captions"]] for image in answer.json["images"]]


def test_several_images_of_a_request_by_form_and_by_json(service, captioner, drawn):
    paths = drawn.paths
    parts = [("images", path.name, path.read_bytes()) for path in paths]
    parts += [("samples", None, b"2"), ("n_best", None, b"2"), ("forbidden", None, b"red")]
    answer = service.ask("POST", "/caption", form(*parts), FORM)
    settings = {"samples": 2, "n_best": 2, "forbidden": ["red"]}
    assert texts_of(answer) == texts_of(service.caption(*paths, **settings))
    expected = captioner.describe(paths, **settings)  # samples depend on the place
    assert texts_of(answer) == [[each.text for each in best] for best in expected]
    for image, path in zip(answer.json["images"], paths, strict=True):
        assert image["name"] == path.name
        assert (image["height"], image["width"] >= 64) == (64, True)
    assert answer.body.count(b"\n") == 1


def test_one_bad_image_is_no_loss_for_the_others(service, drawn):
    good = drawn.paths[0].read_bytes()
    parts = [("images", "good.png", good), ("images", "bad.png", good[:50])]
    answer = service.ask("POST", "/caption", form(*parts), FORM)
    first, second = answer.json["images"]
    assert answer.status == 200
    assert first["captions"][0]["text"] == drawn.captions[drawn.paths[0].name]
    assert second == {"name": "bad.png", "error": second["error"]}
    assert second["error"].startswith("not a readable image (")


def test_attention_is_told_where_it_is_asked_for(service, drawn):
    plain = service.caption(drawn.paths[0]).json["images"][0]["captions"][0]
    assert "attention" not in plain
    answer = service.caption(drawn.paths[0], attention=True, n_best=2)
    for caption in answer.json["images"][0]["captions"]:
        maps = caption["attention"]
        assert maps["words"] == [*caption["text"].split(), "·"]
        rows, columns = maps["size"]
        assert [len(each) for each in maps["maps"]] == [rows * columns] * len(maps["words"])


def test_a_caption_that_no_search_finds_has_no_score(service, drawn):
    vocabulary = [word for text in drawn.captions.values() for word in text.split()]
    answer = service.caption(drawn.paths[0], forbidden=sorted(set(vocabulary)), min_length=3)
    assert answer.json["images"][0]["captions"] == [
        {"text": "", "log_probability": None, "score": None}
    ]


# --- what else there is -----------------------------------------------------------------------


def test_the_description_tells_the_limits_and_its_example_works(service):
    content = service.ask("GET", "/openapi.json").json
    body = content["paths"]["/caption"]["post"]["requestBody"]["content"]["application/json"]
    settings = body["schema"]["properties"]
    assert settings["beam_size"]["maximum"] == 20
    assert settings["beam_size"]["default"] == 3  # the checkpoint's
    assert settings["images"]["maxItems"] == 16
    example = json.dumps(body["example"]).encode()
    answer = service.ask("POST", "/caption", example, JSON)
    assert len(answer.json["images"][0]["captions"]) == body["example"]["n_best"]


def test_the_page_names_all_that_a_browser_may_run(service):
    answer = service.ask("GET", "/")
    assert answer.body.startswith(b"<!doctype html>")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert b"://" not in answer.body  # nothing from elsewhere
    assert not re.search(rb"innerHTML|insertAdjacentHTML|\son\w+=\"", answer.body)


def test_each_request_is_one_line_of_the_log(service):
    service.ask("GET", "/before")
    wait_until(lambda: "GET /before 404" in service.errors.read_text())
    before = service.errors.read_text().count("\n")
    for path in ("/health", "/%0Aforged", "/metrics"):
        service.ask("GET", path)
    wait_until(lambda: service.errors.read_text().count("\n") == before + 3)
    lines = service.errors.read_text().splitlines()[before:]
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} 127\.0\.0\.1 GET \S+ \d{3} [\d.]+ ms"
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    assert [line.split()[3] for line in lines] == ["/health", "/%0Aforged", "/metrics"]


def test_a_decoder_that_is_killed_is_replaced(service, drawn):
    service.caption(drawn.paths[0])
    for decoder in service.decoders():
        decoder.kill()
    for path in drawn.paths[:4]:
        answer = service.caption(path)
        assert answer.status == 200, answer.body
        text = answer.json["images"][0]["captions"][0]["text"]
        assert text == drawn.captions[path.name]


def test_a_model_that_is_killed_is_replaced(service, drawn):
    """With what it was about to caption."""
    for model in service.models():
        model.suspend()
    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(service.caption, path) for path in drawn.paths[:4]]
        wait_until(lambda: service.health()["waiting_images"] == 4)
        for model in service.models():
            model.kill()
    for path, answer in zip(drawn.paths, answers, strict=False):
        text = answer.result().json["images"][0]["captions"][0]["text"]
        assert text == drawn.captions[path.name]


# --- the queue, and the end -------------------------------------------------------------------


@pytest.fixture
def small_service(tiny_model, tmp_path):
    """One that is soon full."""
    limits = ["--max-queue", 4, "--max-images", 3, "--decoders", 1, "--models", 1]
    running = RunningService(tmp_path, tiny_model, *limits)
    yield running
    running.stop()


def test_full_queue_cancelled_requests_and_an_orderly_end(small_service, drawn):
    """One test, so that the service starts once."""
    path = drawn.paths[0]
    image = ("images", path.name, path.read_bytes())
    (model,) = small_service.models()
    model.suspend()  # so that a test can look at what waits for it
    gone = [small_service.begin(post(form(image))) for _ in range(4)]
    wait_until(lambda: small_service.health()["waiting_images"] == 4)
    refused = small_service.caption(path)
    assert refused.status == 503
    assert 1 <= int(refused.headers["Retry-After"]) < 60
    assert refused.json["error"].startswith("too many images are waiting; try again in ")
    for connection in gone:
        connection.close()
    wait_until(lambda: small_service.health()["waiting_images"] == 0)
    lines = small_service.errors.read_text()
    assert len(re.findall(" POST /caption 499 1 images ", lines)) == 4

    accepted = [
        small_service.begin(post(form(image, image))),
        small_service.begin(post(form(image))),
    ]
    wait_until(lambda: small_service.health()["waiting_images"] == 3)
    assert small_service.caption(path, path).status == 503  # there is room for one
    request = post(form(image))
    late = small_service.begin(request[:-100])
    idle = small_service.begin(b"")
    small_service.health()  # so that those two have been let in
    small_service.process.terminate()
    wait_until(lambda: "stopping after what is in flight" in small_service.errors.read_text())
    wait_until(lambda: small_service.ask("GET", "/health").status == 503)
    model.resume()
    late.sendall(request[-100:])
    texts = []
    for connection in (*accepted, late):
        answer = read_answer(connection)
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        texts += [each["captions"][0]["text"] for each in answer.json["images"]]
    assert texts == [drawn.captions[path.name]] * 4
    assert small_service.process.wait(60) == 0  # a second signal would end it at once
    assert read_all(idle) == b""
    lines = small_service.errors.read_text()
    assert lines.splitlines()[-1] == "every request that was accepted is answered"
    # Those that had gone were left out: nobody but the accepted was captioned.
    assert len(re.findall(r" POST /caption 200 ", lines)) == 3
    with pytest.raises(ConnectionRefusedError):
        small_service.begin(b"")


def test_a_service_under_load_that_is_told_to_end_loses_no_request(service, drawn):
    """Its own service would take seconds more: this must be the last test that asks it."""
    path = drawn.paths[0]
    request = post(form(("images", path.name, path.read_bytes())))
    statuses, ended = [], threading.Event()

    def client() -> None:
        while not ended.is_set():
            try:
                connection = service.begin(request)
            except OSError:  # nobody listens any longer
                return
            try:
                statuses.append(read_answer(connection).status)
            except (OSError, http.client.HTTPException) as error:
                statuses.append(repr(error))

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(statuses) > 40)
    service.process.terminate()
    for thread in threads:
        thread.join(60)
    ended.set()
    assert set(statuses) == {200}
    assert service.process.wait(60) == 0


# --- keys, slow senders, and what isn't to be ---------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tiny_model, tmp_path_factory):
    """One with keys, that waits for nobody long."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys.txt").write_text("first-key\n\nsecond-key\n")
    limits = ["--receive-seconds", 2, "--decode-seconds", 2, "--max-connections", 12]
    running = RunningService(
        folder, tiny_model, "--api-key-file", folder / "keys.txt", "--decoders", 1, *limits
    )
    yield running
    assert running.stop() == 0


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys(guarded, drawn):
    body = form(("images", "a.png", drawn.paths[0].read_bytes()))
    for wrong in ({}, bearer("third-key"), bearer(""), bearer("first-ke")):
        answer = guarded.ask("POST", "/caption", body, FORM | wrong)
        assert (answer.status, answer.headers.get("WWW-Authenticate")) == (401, "Bearer"), wrong
        assert answer.json == {"error": "an API key is needed: Authorization: Bearer KEY"}
    assert (
        guarded.ask("POST", "/caption", body, FORM | {"Authorization": "first-key"}).status == 401
    )
    for key in ("first-key", "second-key"):
        assert guarded.ask("POST", "/caption", body, FORM | bearer(key)).status == 200
    for path, status in (("/metrics", 401), ("/openapi.json", 401), ("/health", 200), ("/", 200)):
        assert guarded.ask("GET", path).status == status
    assert guarded.ask("GET", "/metrics", headers=bearer("first-key")).status == 200
    assert "-key" not in guarded.errors.read_text()


def test_slow_senders_are_cut_off(guarded):
    head = b"POST /caption HTTP/1.1\r\nHost: localhost\r\n"
    whole = post(b"x" * 1000, **bearer("first-key"))
    silent, half_head, half_body = map(guarded.begin, (b"", head, whole[:-500]))
    answer = read_answer(half_body)
    assert answer.status == 408
    assert answer.json == {"error": "the request took more than 2 seconds to come"}
    assert read_all(silent) == read_all(half_head) == b""


def test_a_decoder_that_hangs_is_given_up(guarded, drawn):
    body = form(("images", "a.png", drawn.paths[0].read_bytes()))
    assert guarded.ask("POST", "/caption", body, FORM | bearer("first-key")).status == 200
    (decoder,) = guarded.decoders()
    decoder.suspend()
    answer = guarded.ask("POST", "/caption", body, FORM | bearer("first-key"))
    assert answer.status == 422
    assert answer.json == {"error": "a.png: it takes more than 2 seconds to decode"}
    assert guarded.ask("POST", "/caption", body, FORM | bearer("first-key")).status == 200


def test_connections_that_are_too_many_are_closed(guarded):
    many = [guarded.begin(b"") for _ in range(30)]
    closed = 0
    for connection in many:
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            closed += connection.recv(1) == b""
    for connection in many:
        connection.close()
    assert closed >= 18
    wait_until(lambda: guarded.health()["status"] == "ok")


def test_wrong_command_lines(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, code, message in (
            (["--port", "70000"], 2, "--port: 0 to 65535 was expected, found 70000"),
            (["--port", str(port)], 2, f"can't listen on 127.0.0.1, port {port}: "),
            (["--host", "no.such.host.invalid", "--port", "0"], 2, "can't listen on no.such.host"),
            (["--api-key-file", str(empty)], 2, "it holds no key"),
            (["--api-key-file", str(tmp_path / "none")], 2, "none: no such file"),
            (["--max-batch", "0"], 1, "service.max_batch: at least 1 was expected, found 0"),
            (["--max-queue", "3"], 1, "service.max_images: at most service.max_queue = 3"),
            (["no-such-checkpoint"], 1, "no-such-checkpoint: no such checkpoint"),
        ):
            assert serve.main([*options, "--device", "cpu"]) == code
            lines = capsys.readouterr().err.splitlines()
            assert message in lines[-1]
            assert lines[-1].startswith("error: ")


def test_settings_that_are_impossible():
    for wrong in ({"decode_seconds": 0.0}, {"max_body_mb": float("nan")}, {"decoders": 0}):
        with pytest.raises(ConfigError, match=rf"service\.{next(iter(wrong))}: "):
            ServiceConfig(**wrong)


def test_the_key_may_be_in_the_environment(monkeypatch):
    monkeypatch.setenv(serve.KEY_VARIABLE, "only-key")
    assert serve._read_keys(None) == ["only-key"]
