"""The captioner that comes with the package: found without a name, whole, and as good as told."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from shared_data import SHARED

from captioner import Captioner
from captioner.checkpoint_directory import (
    DEFAULT_NAME,
    PRETRAINED_DIR,
    find_checkpoint,
    is_checkpoint,
    pretrained_captioners,
)
from captioner.commands import caption, models
from captioner.data.annotations import read_annotations
from captioner.errors import CheckpointError
from captioner.metrics import compute_metrics

ROOT = Path(__file__).parents[2]
SAID = f"captioning with {DEFAULT_NAME}, which comes with the package: no other was named\n"


def test_photographs_are_captioned_without_naming_a_checkpoint(drawn, capsys):
    path = drawn.paths[0]
    assert caption.main([str(path), "--device", "cpu", "--precision", "float32"]) == 0
    shown = capsys.readouterr()
    assert shown.err == SAID
    name, _, text = shown.out.rstrip("\n").partition("\t")
    assert name == str(path)
    assert text.split()[0] in ("a", "the", "two")

    captioner = Captioner.from_pretrained(device="cpu", precision="float32")
    assert capsys.readouterr().err == SAID
    assert captioner.caption(path) == text
    named = Captioner.from_pretrained(DEFAULT_NAME, device="cpu", precision="float32")
    assert named.caption(path) == text
    assert capsys.readouterr().err == ""


def test_a_name_or_a_checkpoint_may_come_first_or_as_an_option(checkpoint, drawn, capsys):
    path = str(drawn.paths[0])
    shown = {}
    for words in (
        [str(checkpoint), path],
        ["--checkpoint", str(checkpoint), path],
        [DEFAULT_NAME, path],
        ["--checkpoint", DEFAULT_NAME, path],
    ):
        assert caption.main([*words, "--device", "cpu"]) == 0
        shown[words[-2], len(words)] = capsys.readouterr()
    assert not any(one.err for one in shown.values())
    assert shown[str(checkpoint), 2].out == shown[str(checkpoint), 3].out
    assert shown[str(checkpoint), 2].out == f"{path}\t{drawn.captions[drawn.paths[0].name]}\n"
    assert shown[DEFAULT_NAME, 2].out == shown[DEFAULT_NAME, 3].out
    for alone in (str(checkpoint), DEFAULT_NAME):
        assert caption.main([alone]) == 2
        expected = f"error: {alone}: the images or folders to caption are missing after it\n"
        assert capsys.readouterr().err == expected


def test_a_folder_of_photographs_with_the_name_is_captioned(drawn, tmp_path, monkeypatch, capsys):
    """What lies in the working folder is what is meant, unless it is asked for as a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_NAME).mkdir()
    shutil.copy(drawn.paths[0], tmp_path / DEFAULT_NAME / "one.png")
    (tmp_path / DEFAULT_NAME / "config.json").write_text("{}")  # any program's
    assert not is_checkpoint(DEFAULT_NAME)
    assert caption.main([DEFAULT_NAME, "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("one.png\t")
    assert SAID in shown.err
    assert find_checkpoint(DEFAULT_NAME) == PRETRAINED_DIR / DEFAULT_NAME


def test_unknown_names_are_refused():
    with pytest.raises(CheckpointError, match=rf"did you mean '{DEFAULT_NAME}'\?"):
        find_checkpoint(DEFAULT_NAME.replace("net", "ent"))
    with pytest.raises(CheckpointError, match=r"^xyz: no such checkpoint directory, and no name"):
        find_checkpoint("xyz")


def test_what_comes_with_the_package_is_listed(capsys):
    assert models.main([]) == 0
    listed = capsys.readouterr().out
    for captioner in pretrained_captioners():
        assert captioner.name in listed
        assert str(captioner.directory) in listed
        assert captioner.size < 25e6
        assert f"CIDEr-D {100 * captioner.config['scores']['CIDEr-D']:.1f}" in listed
        assert captioner.card.startswith(f"# {captioner.name}\n")
        assert models.main([captioner.name]) == 0
        assert capsys.readouterr().out == captioner.card.rstrip() + "\n"
    assert DEFAULT_NAME in listed
    assert models.main(["mobilenet"]) == 2
    assert f"did you mean '{DEFAULT_NAME}'?" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/flickr8k")
def test_it_captions_photographs_as_well_as_told():
    """On 100 photographs of val; CIDEr-D of these with frequencies of their own."""
    images = read_annotations(SHARED / "data/flickr8k/annotations/captions_val.json").images[:100]
    captioner = Captioner.from_pretrained(DEFAULT_NAME, device="cpu")
    paths = [SHARED / "data/flickr8k/images" / str(image.file_name) for image in images]
    captions = dict(enumerate(captioner.caption(paths)))
    references = dict(enumerate(image.captions for image in images))
    scores = compute_metrics(captions, references, ["BLEU"])
    assert scores["BLEU-4"] > 0.2


def test_a_built_wheel_captions_from_another_folder(tmp_path, drawn):
    source = tmp_path / "source"  # building writes into it
    source.mkdir()
    for name in ("captioner", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    code = "import captioner, sys; print(captioner.__file__, file=sys.stderr); "
    code += "from captioner.commands import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "caption", str(drawn.paths[0])]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert str(tmp_path / "installed") in done.stderr
    assert done.stdout.startswith(f"{drawn.paths[0]}\ta")
