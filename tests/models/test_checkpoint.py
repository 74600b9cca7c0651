"""Checkpoints: whole round trips, nothing run on loading, damage named in one line."""

import copy
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from captioner.config import DecoderConfig, SearchConfig
from captioner.data.preprocessing import Preprocessing
from captioner.data.vocabulary import SPECIAL_WORDS, Vocabulary
from captioner.errors import CheckpointError
from captioner.inference.captioner import Captioner
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import load_checkpoint, save_checkpoint
from captioner.models.encoder import Encoder

ROOT = Path(__file__).parents[2]
FORMAT_1 = sorted(Path(__file__).with_name("checkpoints_format_1").iterdir())


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


@pytest.fixture
def unchecked(checkpoint) -> Path:
    """As earlier versions wrote it, or a stranger: without what its files should be."""
    (checkpoint / "SHA256SUMS").unlink()
    return checkpoint


def test_round_trip(tiny_model, captioner, checkpoint, drawn):
    loaded = load_checkpoint(checkpoint)
    for (name, one), (other_name, other) in zip(
        tiny_model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert loaded.vocabulary.words == tiny_model.vocabulary.words
    assert loaded.encoder.preprocessing == tiny_model.encoder.preprocessing
    assert loaded.search == tiny_model.search == SearchConfig(3, 8, 0.7)
    assert not loaded.training
    captions = Captioner(loaded, "cpu", "float32").caption(drawn.paths)
    assert captions == captioner.caption(drawn.paths) == list(drawn.captions.values())


@pytest.mark.parametrize("folder", FORMAT_1, ids=lambda folder: folder.name)
def test_checkpoints_of_format_1_load_and_give_the_same_captions(folder):
    """Written by captioner 0.1.0, with what it said about pictures of one colour."""
    captioner = Captioner.from_pretrained(folder, "cpu", "float32")
    for colour, captions in json.loads((folder / "captions.json").read_text()).items():
        picture = Image.new("RGB", (32, 32), colour)
        described = captioner.describe(picture, beam_size=3, n_best=3)
        assert [caption.text for caption in described] == [text for text, _ in captions]
        log_probabilities = [caption.log_probability for caption in described]
        assert log_probabilities == pytest.approx([score for _, score in captions], abs=1e-4)


@pytest.mark.parametrize("kind", ["show_and_tell", "show_attend_tell"])
def test_the_oldest_checkpoints_load_too(tmp_path, kind):
    """They lack newer settings, and hold torch's own names of the recurrent weights."""
    source = next(folder for folder in FORMAT_1 if folder.name == f"{kind}_lstm")
    folder = shutil.copytree(source, tmp_path / "old")

    def forget(content):
        for name in ("recurrent_initialisation", "forget_bias"):
            del content["decoder"][name]

    edit_json(folder / "config.json", forget)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    older = {name.replace(".fused.", "."): tensor for name, tensor in tensors.items()}
    assert (older.keys() == tensors.keys()) == (kind == "show_attend_tell")
    safetensors.torch.save_file(older, path)
    loaded, expected = load_checkpoint(folder), load_checkpoint(source)
    for one, other in zip(loaded.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["mnasnet0_5", "regnet_x_400mf", "shufflenet_v2_x0_5"])
def test_cnns_that_are_built_in_their_own_ways_come_back(name, tmp_path):
    """A version that MNASNet asks for, and sizes that RegNet computes with tensors."""
    preprocessing = Preprocessing("squash", 32, 32)
    vocabulary = Vocabulary([*SPECIAL_WORDS, "a"])
    decoder = DecoderConfig("show_and_tell", embedding_size=4, hidden_size=4)
    model = CaptioningModel(Encoder(name, preprocessing), decoder, vocabulary, SearchConfig())
    save_checkpoint(model, tmp_path, {})
    loaded = load_checkpoint(tmp_path)
    for part, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[part], tensor)
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    assert all(parameter.requires_grad for parameter in loaded.decoder.parameters())
    assert loaded.encoder.grid_shape == model.encoder.grid_shape
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(loaded.encoder(pixels), model.eval().encoder(pixels))


def test_the_padding_of_the_cnn_comes_back(tmp_path):
    preprocessing = Preprocessing("squash", 32, 32)
    vocabulary = Vocabulary([*SPECIAL_WORDS, "a"])
    decoder = DecoderConfig("show_and_tell", embedding_size=4, hidden_size=4)
    encoder = Encoder("mnasnet0_5", preprocessing, padding="tensorflow")
    save_checkpoint(CaptioningModel(encoder, decoder, vocabulary, SearchConfig()), tmp_path, {})
    loaded = load_checkpoint(tmp_path).encoder
    assert loaded.padding == "tensorflow"
    pixels = torch.arange(3 * 32 * 32).view(1, 3, 32, 32).to(torch.uint8)
    stem = [cnn.cnn.layers[0](cnn.normalise(pixels)) for cnn in (loaded, encoder)]
    assert torch.equal(*stem)
    plain = Encoder("mnasnet0_5", preprocessing, tensors=encoder.state_dict())
    assert not torch.equal(stem[0], plain.cnn.layers[0](plain.normalise(pixels)))


def test_a_checkpoint_from_before_there_was_padding_has_torchvisions(unchecked, captioner, drawn):
    edit_json(unchecked / "config.json", lambda content: content["encoder"].pop("padding") and None)
    assert load_checkpoint(unchecked).encoder.padding == "torchvision"
    loaded = Captioner.from_pretrained(unchecked, "cpu", "float32")
    assert loaded.caption(drawn.paths) == captioner.caption(drawn.paths)


def test_a_loaded_model_does_not_lean_on_its_file(checkpoint):
    """Weights that were only mapped from it would change, or crash, with it."""
    path = checkpoint / "model.safetensors"
    loaded = load_checkpoint(checkpoint)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_needs_nothing_but_its_directory(checkpoint, drawn, tmp_path):
    """Moved, read in another process, in another working directory, the original gone."""
    moved = tmp_path / "elsewhere" / "model"
    moved.parent.mkdir()
    shutil.move(checkpoint, moved)
    code = (
        "import sys; from captioner import Captioner;"
        "print(Captioner.from_pretrained('model', device='cpu').caption(sys.argv[1]))"
    )
    name, caption = list(drawn.captions.items())[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(drawn.images / name)],
        cwd=moved.parent,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{caption}\n"


def test_saving_a_loaded_checkpoint_gives_the_same_bytes(checkpoint, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    save_checkpoint(load_checkpoint(checkpoint), again, {"BLEU-4": 1.0})
    for path in checkpoint.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"model.safetensors", "config.json", "vocabulary.json", "SHA256SUMS"}


def test_vocabulary_and_preprocessing_come_from_the_checkpoint(unchecked, drawn):
    name = "02_lime_disc.png"
    assert Captioner.from_pretrained(unchecked, "cpu").caption(drawn.images / name) == (
        "a bright green disc"
    )
    path = unchecked / "vocabulary.json"
    edit_json(path, lambda words: ["grass-coloured" if word == "green" else word for word in words])
    loaded = Captioner.from_pretrained(unchecked, "cpu", "float32")
    assert loaded.caption(drawn.images / name) == "a bright grass-coloured disc"

    preprocessing = loaded.model.encoder.preprocessing
    assert (preprocessing.resize, preprocessing.image_size) == ("squash", 48)
    assert loaded.model.encoder.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])

    def change_preprocessing(config):
        changed = config["encoder"]["preprocessing"]
        changed["image_size"] = 32
        changed["mean"] = [0.9, 0.9, 0.1]

    edit_json(unchecked / "config.json", change_preprocessing)
    other = load_checkpoint(unchecked)
    assert other.encoder.preprocessing.image_size == 32
    pixels = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    assert not torch.equal(other.encoder(pixels), loaded.model.encoder(pixels))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocabulary.json"])
def test_missing_file(unchecked, name):
    (unchecked / name).unlink()
    message = refusal(unchecked)
    assert f"{name}: no such file" in message


def test_missing_directory_and_a_file_in_its_place(tmp_path):
    assert "no such checkpoint directory" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "no such checkpoint directory" in refusal(tmp_path / "file")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_cut_short_weights(unchecked, share):
    path = unchecked / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "model.safetensors: not a safetensors file, or cut short" in refusal(unchecked)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json"])
def test_cut_short_json(unchecked, name):
    path = unchecked / name
    path.write_bytes(path.read_bytes()[:-20])
    assert re.search(f"{name}: not valid JSON at line .* is the file complete", refusal(unchecked))


class Trap:
    """Unpickled, it makes a file: proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("write", "run"),
    [(pickle.dump, pickle.load), (torch.save, functools.partial(torch.load, weights_only=False))],
)
def test_a_booby_trapped_pickle_is_refused_and_not_run(unchecked, tmp_path, write, run):
    sprung = tmp_path / "sprung"
    path = unchecked / "model.safetensors"
    with open(path, "wb") as file:
        write({"decoder.output.bias": Trap(sprung)}, file)
    assert "other formats are refused because they can run code" in refusal(unchecked)
    assert not sprung.exists()
    # The trap does work: whoever unpickles the file runs its code.
    with open(path, "rb") as file:
        run(file)
    assert sprung.exists()


def drop(key):
    return lambda content: content.pop(key) and None


def change(*keys, to):
    def apply(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (change("format", to=3), "checkpoint format 2 or earlier was expected, found 3"),
        (drop("format"), "checkpoint format 2 or earlier was expected, found None"),
        (change("decoder", "hidden_sise", to=3), "unknown key 'decoder.hidden_sise'; did you mean"),
        (change("search", "beams", to=3), "unknown key 'search.beams'"),
        (change("decoder", "hidden_size", to="32"), "hidden_size: .*found '32'"),
        (change("decoder", "hidden_size", to=33), "doesn't fit config.json"),
        (change("decoder", "kind", to="show_and_tell"), "doesn't fit config.json"),
        (change("search", "beam_size", to=0), "beam_size: at least 1 was expected, found 0"),
        (drop("decoder"), "config.json: decoder: field required"),
        (change("encoder", to=[]), "config.json: "),
        (change("encoder", "name", to="squeezenet1_9"), "no CNN 'squeezenet1_9'; did you mean"),
        (change("encoder", "preprocessing", "image_size", to=-1), "config.json: "),
        (change("encoder", "preprocessing", "mean", to=[0.5]), "config.json: "),
        (
            change("encoder", "preprocessing", "crop", to=1),
            "unknown key 'encoder.preprocessing.crop'",
        ),
        (lambda _: ["not", "an", "object"], "a JSON dict was expected"),
    ],
)
def test_a_config_that_does_not_fit(unchecked, edit, expected):
    edit_json(unchecked / "config.json", edit)
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(unchecked)
    refusal(unchecked)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda words: [*words, "zebra"], "doesn't fit config.json"),
        (lambda words: words[:-1], "doesn't fit config.json"),
        (lambda words: [*words[:-1], words[-2]], "vocabulary.json: .*no word twice"),
        (lambda words: words[1:], "vocabulary.json: .*must begin with <pad> <bos> <eos> <unk>"),
        (lambda words: [*words[:-1], 5], "a list of words was expected"),
        (lambda words: {"words": words}, "a JSON list was expected"),
    ],
)
def test_a_vocabulary_that_does_not_fit(unchecked, edit, expected):
    edit_json(unchecked / "vocabulary.json", edit)
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(unchecked)
    refusal(unchecked)


def test_weights_that_are_not_all_there(unchecked):
    path = unchecked / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["decoder.output.bias"]
    safetensors.torch.save_file(tensors, path)
    message = refusal(unchecked)
    assert "doesn't fit config.json (decoder: 1 are missing (output.bias))" in message
    path.unlink()
    path.mkdir()
    refusal(unchecked)


# --- checksums --------------------------------------------------------------------------------

FILES = ["model.safetensors", "config.json", "vocabulary.json"]


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [9, -1000, -9])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_is_seen_and_the_file_named(checkpoint, name, place):
    path = checkpoint / name
    flip_byte(path, max(place, -path.stat().st_size))
    message = refusal(checkpoint)
    assert message.startswith(f"{path}: not what was saved, its SHA-256 differs")
    assert "copy the checkpoint again" in message


def test_whoever_edits_a_setting_of_the_search_is_told_what_to_do(checkpoint):
    edit_json(checkpoint / "config.json", change("search", "beam_size", to=2))
    message = refusal(checkpoint)
    assert "if you changed config.json yourself, delete its line" in message
    path = checkpoint / "SHA256SUMS"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "config.json" not in line))
    assert load_checkpoint(checkpoint).search.beam_size == 2
    flip_byte(checkpoint / "model.safetensors", -9)  # the others are still watched over
    assert "model.safetensors: not what was saved" in refusal(checkpoint)


def test_the_checksums_are_those_of_coreutils(checkpoint):
    program = shutil.which("sha256sum") or pytest.skip("needs the program sha256sum")
    done = subprocess.run(
        [program, "--check", "SHA256SUMS"], cwd=checkpoint, capture_output=True, text=True
    )
    assert done.stdout == "config.json: OK\nmodel.safetensors: OK\nvocabulary.json: OK\n"


@pytest.mark.parametrize("content", [b"abc", b"\xff\xfe", b"0" * 64 + b"config.json\n"])
def test_damaged_checksums_are_named(checkpoint, content):
    (checkpoint / "SHA256SUMS").write_bytes(content)
    assert "SHA256SUMS: " in refusal(checkpoint)


# --- written whole or not at all --------------------------------------------------------------

WRITER = """
import itertools, shutil, sys
from captioner import files
if sys.argv[1] == "False":
    files._exchange = lambda *_: False
for source in itertools.cycle(sys.argv[3:]):
    with files.atomic_directory(sys.argv[2]) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True)
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_whole_checkpoint_is_loaded_while_writers_are_killed(
    tiny_model, checkpoint, tmp_path, exchange
):
    """Two versions take turns; files of both never come together."""
    other = tmp_path / "other"
    other.mkdir()
    changed = copy.deepcopy(tiny_model)
    changed.decoder.output.bias += 1
    changed.search = SearchConfig(2, 8, 0.7)
    save_checkpoint(changed, other, {})
    models = {3: tiny_model, 2: changed}  # by beam size
    last = shutil.copytree(checkpoint, tmp_path / "run/last")
    command = [sys.executable, "-c", WRITER, str(exchange), last, checkpoint, other]
    for milliseconds in (0, 5):
        seen = set()
        with subprocess.Popen(command) as writer:
            give_up = time.monotonic() + 60
            while seen != {2, 3} and time.monotonic() < give_up:
                loaded = load_checkpoint(last)
                seen.add(loaded.search.beam_size)
                expected = models[loaded.search.beam_size].decoder.output.bias
                assert torch.equal(loaded.decoder.output.bias, expected)
            time.sleep(milliseconds / 1000)
            writer.kill()
        assert seen == {2, 3}
        assert load_checkpoint(last).search.beam_size in (2, 3)


def test_a_checkpoint_that_is_out_of_the_way_is_loaded_where_it_is(checkpoint, tiny_model):
    """As after a kill between two renames, where directories can't be exchanged."""
    previous = checkpoint.rename(checkpoint.with_name(".checkpoint.previous"))
    assert load_checkpoint(checkpoint).vocabulary.words == tiny_model.vocabulary.words
    assert previous.exists()
    assert not checkpoint.exists()
