"""Checkpoints from strangers: each ends in one line, soon, and with little memory."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import socket
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from captioner.data.vocabulary import SPECIAL_WORDS
from captioner.errors import CheckpointError
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import load_checkpoint, save_checkpoint

MEGABYTES = 400  # of address space, beyond what the test's process has
HUGE = 10**19


@pytest.fixture(scope="module")
def good(tiny_model: CaptioningModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without checksums: a stranger would write them for what is there."""
    directory = tmp_path_factory.mktemp("good")
    save_checkpoint(tiny_model, directory, {})
    (directory / "SHA256SUMS").unlink()
    load_checkpoint(directory)  # torch and pydantic have done by now what they do once
    return directory


@pytest.fixture
def hostile(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "hostile")


@contextlib.contextmanager
def bounded():
    """Let a block take a second of processor time, and ``MEGABYTES`` more memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError):  # /proc is Linux's
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        taken = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEGABYTES * 2**20, limits[1]))
    started = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - started < 1


def refusal(directory: Path) -> str:
    with bounded(), pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(directory))
    assert len(message) < len(str(directory)) + 500
    return message.removeprefix(str(directory))


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


PREPROCESSING = "encoder.preprocessing"

# The setting, its value as JSON, and what the message says.
CONFIGS = [
    (f"{PREPROCESSING}.resize_size", "-1", "preprocessing.resize_size: at least 1"),
    (f"{PREPROCESSING}.resize_size", "0", "preprocessing.resize_size: at least 1"),
    (f"{PREPROCESSING}.resize_size", str(HUGE), "preprocessing.resize_size: at most 4096"),
    (f"{PREPROCESSING}.resize_size", "224.5", "resize_size: input should be a valid integer"),
    (f"{PREPROCESSING}.image_size", "0", "preprocessing.image_size: at least 1"),
    (f"{PREPROCESSING}.image_size", "100000", "preprocessing.image_size: at most 2048"),
    (f"{PREPROCESSING}.image_size", str(HUGE), "preprocessing.image_size: at most 2048"),
    (f"{PREPROCESSING}.image_size", "9" * 5000, "config.json: "),
    (f"{PREPROCESSING}.image_size", "2", "gives no feature map for 2 x 2 pixels"),
    (f"{PREPROCESSING}.interpolation", '"cubist"', "'bilinear' or 'bicubic' was expected, found"),
    (f"{PREPROCESSING}.interpolation", "null", "interpolation: input should be a valid string"),
    (f"{PREPROCESSING}.resize", '"stretch"', "'crop' or 'squash' was expected, found 'stretch'"),
    (f"{PREPROCESSING}.resize", '"' + "a" * 900_000 + '"', "'crop' or 'squash' was expected"),
    (f"{PREPROCESSING}.mean", "[0, 0, NaN]", "preprocessing.mean: three numbers"),
    (f"{PREPROCESSING}.mean", "[0, 0, 1e999]", "preprocessing.mean: three numbers"),
    (f"{PREPROCESSING}.mean", f"[{'0, ' * 99_999} 0]", "preprocessing.mean: three numbers"),
    (f"{PREPROCESSING}.std", "[1, 1, 0]", "preprocessing.std: three numbers"),
    (f"{PREPROCESSING}.std", "[1, 1, -1]", "preprocessing.std: three numbers"),
    (PREPROCESSING, "[]", "config.json: encoder.preprocessing: "),
    ("encoder.name", '"regnet_y_128gf"', "doesn't fit config.json (encoder: "),
    ("encoder.name", '"vgg19"', "doesn't fit config.json (encoder: "),
    ("encoder.name", '"vit_h_14"', "doesn't fit config.json (encoder: "),
    ("encoder.name", '"os.system"', "torchvision has no CNN 'os.system'"),
    ("encoder.name", '"maskrcnn_resnet50_fpn"', "torchvision has no CNN"),
    ("encoder.name", '"../../etc/passwd"', "torchvision has no CNN"),
    ("encoder.name", '""', "torchvision has no CNN ''"),
    ("encoder.name", '"' + "a" * 900_000 + '"', "torchvision has no CNN"),
    ("encoder.name", "[]", "encoder.name: input should be a valid string"),
    ("encoder.last_stage", '"__class__"', "has no stage '__class__'"),
    ("encoder.last_stage", "3", "encoder.last_stage: input should be a valid string"),
    ("encoder.padding", '"valid"', "encoder.padding: input should be 'torchvision' or 'tensorf"),
    ("encoder.padding", '"tensorflow"', "encoder.padding=tensorflow can't be had with squeezenet"),
    ("encoder", '"squeezenet1_1"', "config.json: encoder: "),
    ("decoder.hidden_size", "30000", "doesn't fit config.json (decoder: "),
    ("decoder.hidden_size", str(HUGE), "decoder.hidden_size: at most 32768"),
    ("decoder.hidden_size", "0", "decoder.hidden_size: at least 1"),
    ("decoder.embedding_size", "32768", "doesn't fit config.json (decoder: "),
    ("decoder.embedding_size", "1000000000", "decoder.embedding_size: at most 32768"),
    ("decoder.attention_size", "1000000000", "decoder.attention_size: at most 32768"),
    ("decoder.feature_size", "1000000000", "decoder.feature_size: at most 32768"),
    ("decoder.attributes", "1000000000", "decoder.attributes: at most 32768"),
    ("decoder.attributes", "-1", "decoder.attributes: at least 0"),
    ("decoder.attributes", "30000", "config.json: decoder.attributes: at most 10 was expected"),
    ("decoder.attributes", "10", "doesn't fit config.json (decoder: "),
    ("decoder.layers", "1000000", "decoder.layers: at most 32"),
    ("decoder.layers", "32", "doesn't fit config.json (decoder: "),
    ("decoder.dropout", "-1", "decoder.dropout: "),
    ("decoder.kind", '"__init__"', "decoder.kind: no decoder '__init__'"),
    ("decoder.cell", '"eval"', "decoder.cell: input should be"),
    ("search.beam_size", str(HUGE), "search.beam_size: at most 10000"),
    ("search.max_length", "1000000000", "search.max_length: at most 1000"),
    ("search.samples", "1000000000", "search.samples: at most 10000"),
    ("search.groups", "1000000000", "search.groups: at most 10000"),
    ("search.length_penalty", "1e308", "search.length_penalty: at most 100"),
    ("search.seed", str(2**64), "search.seed: at most"),
    ("search.forced", json.dumps(["a"] * 101), "search.forced: at most 100 phrases"),
    ("search.forced", json.dumps(["a " * 1000]), "a phrase has more than 200 characters"),
    ("search.forbidden", json.dumps(["a"] * 10_001), "search.forbidden: at most 10000 phrases"),
    ("search.no_repeat_word", '"yes"', "search.no_repeat_word: input should be a valid boolean"),
    ("scores", nested(900), "config.json: "),
    ("search", nested(500), "config.json: "),
    ("format", nested(100), "checkpoint format 2 or earlier was expected"),
    ("format", "1e999", "checkpoint format 2 or earlier was expected"),
    ("format", "true", "config.json: format: input should be a valid integer"),
    ("captioner", '"\\ud800"', "config.json: "),
    ("unknown", "1", "unknown key 'unknown'"),
]


@pytest.mark.parametrize(("setting", "value", "expected"), CONFIGS)
def test_a_hostile_setting_is_named(hostile, setting, value, expected):
    path = hostile / "config.json"
    content = json.loads(path.read_text())
    *sections, name = setting.split(".")
    section = content
    for each in sections:
        section = section[each]
    section[name] = "HERE"
    path.write_text(json.dumps(content).replace('"HERE"', value))
    assert expected in refusal(hostile)


WORDS = list(SPECIAL_WORDS)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", nested(100_000), "config.json: not usable JSON"),
        ("config.json", '{"a":' * 50_000, "config.json: not usable JSON"),
        ("config.json", " " * 2**20 + "{}", "config.json: at most 1,048,576 bytes"),
        ("config.json", "{}", "checkpoint format 2 or earlier was expected, found None"),
        ("config.json", '{"format": 2}', "config.json: captioner: field required"),
        ("config.json", "null", "a JSON dict was expected"),
        ("config.json", "", "config.json: not valid JSON"),
        ("vocabulary.json", nested(100_000), "vocabulary.json: not usable JSON"),
        ("vocabulary.json", nested(500), "vocabulary.json: a list of words was expected"),
        ("vocabulary.json", "[]", "vocabulary.json: .*must begin with <pad>"),
        ("vocabulary.json", json.dumps([*WORDS, "a", "a"]), "no word twice"),
        ("vocabulary.json", json.dumps([*WORDS, "\ud800"]), "a word isn't valid Unicode"),
        ("vocabulary.json", json.dumps([*WORDS, ["a"]]), "a list of words was expected"),
        (
            "vocabulary.json",
            json.dumps(WORDS + [str(number) for number in range(1_000_000)]),
            "at most 1,000,000 words were expected, found 1,000,004",
        ),
        (
            "vocabulary.json",
            json.dumps(WORDS + [str(number) for number in range(300_000)]),
            r"doesn't fit config.json \(decoder: .*embedding.weight",
        ),
        ("vocabulary.json", " " * 2**25 + "[]", "vocabulary.json: at most 33,554,432 bytes"),
    ],
    ids=range(16),
)
def test_hostile_json_is_named(hostile, name, content, expected):
    (hostile / name).write_text(content)
    assert re.search(expected, refusal(hostile))


def test_bounds_leave_room_for_the_largest_that_is_sensible(hostile):
    path = hostile / "config.json"
    content = json.loads(path.read_text())
    content["search"] |= {"beam_size": 10_000, "max_length": 1000, "forbidden": ["a"] * 10_000}
    content["encoder"]["preprocessing"] |= {"resize_size": 4096, "image_size": 600}
    path.write_text(json.dumps(content))
    assert load_checkpoint(hostile).encoder.grid_shape == (37 * 37, 512)


# --- files that aren't files --------------------------------------------------------------------

NAMES = ["model.safetensors", "config.json", "vocabulary.json", "SHA256SUMS"]


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(hostile, monkeypatch, name, kind):
    path = hostile / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        monkeypatch.chdir(hostile)  # a socket's address is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    assert refusal(hostile).startswith(f"/{name}: ")


# --- weights ------------------------------------------------------------------------------------


def test_weights_with_flipped_bytes_load_or_are_refused_in_one_line(hostile):
    """Without checksums what is damaged can't always be seen; but nothing else goes wrong."""
    path = hostile / "model.safetensors"
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    random.seed(0)
    refused = 0
    for _ in range(30):
        damaged = bytearray(content)
        damaged[random.randrange(8 + header)] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            load_checkpoint(hostile)
            continue
        assert refusal(hostile).startswith("/model.safetensors: ")
        refused += 1
    assert refused > 25


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensor: tensor.to(torch.int32), "1 are no floating-point numbers (output.bias)"),
        (lambda tensor: tensor.to(torch.complex64), "1 are no floating-point numbers"),
        (lambda tensor: tensor[:0], "1 are of another shape (output.bias)"),
        (lambda tensor: tensor.unsqueeze(0).contiguous(), "1 are of another shape (output.bias)"),
    ],
)
def test_tensors_of_another_kind_are_refused(hostile, change, expected):
    path = hostile / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["decoder.output.bias"] = change(tensors["decoder.output.bias"].clone())
    safetensors.torch.save_file(tensors, path)
    assert expected in refusal(hostile)


def test_tensors_of_nothing_in_the_model_are_refused(hostile):
    path = hostile / "model.safetensors"
    tensors = safetensors.torch.load_file(path) | {"critic.weight": torch.zeros(3)}
    safetensors.torch.save_file(tensors, path)
    assert "no part of a captioner is called critic" in refusal(hostile)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E4M3", "U64", "BOOL", "X9"])
def test_tensors_of_any_dtype_are_read_or_refused(hostile, dtype):
    path = hostile / "model.safetensors"
    header = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert refusal(hostile).startswith("/model.safetensors: ")


def test_weights_of_format_1_that_lack_some_are_refused(hostile):
    tensors = {"decoder.hidden_output.weight": torch.zeros(2, 2)}
    safetensors.torch.save_file(tensors, hostile / "model.safetensors")
    path = hostile / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    assert "doesn't fit config.json (format 1: 'decoder.context_output.weight')" in refusal(hostile)
