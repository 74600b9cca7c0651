"""Exported captioners on the command line, and where there is no torch."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_commands import run_caption

from captioner.commands import caption, export
from captioner.inference.outputs import failures_path
from captioner.runtime.__main__ import main as runtime_main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    from captioner.models.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("exports")
    (folder / "checkpoint").mkdir()
    save_checkpoint(tiny_model, folder / "checkpoint", {"BLEU-4": 1.0})
    assert export.main([str(folder / "checkpoint"), str(folder / "exported")]) == 0
    return folder / "exported"


def test_it_runs_where_there_is_no_torch(exported, drawn, tmp_path):
    """In an environment with NumPy, Pillow and onnxruntime alone."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "captioner", site / "captioner", ignore=shutil.ignore_patterns("*.s*"))
    for name in ("numpy", "PIL", "onnxruntime"):
        (package,) = importlib.util.find_spec(name).submodule_search_locations
        for path in Path(package).parent.glob(f"{name}*"):
            if path.name in (name, f"{name}.libs"):
                (site / path.name).symlink_to(path)
    for path in Path(package).parent.glob("pillow.libs"):
        (site / path.name).symlink_to(path)
    environment = os.environ | {"PYTHONPATH": str(site)}
    python = [sys.executable, "-S"]  # without the packages of this environment
    for name in ("torch", "tqdm", "pydantic", "nltk"):
        found = subprocess.run(
            [*python, "-c", f"import {name}"], env=environment, check=False, capture_output=True
        )
        assert found.returncode, name
    paths = [str(path) for path in drawn.paths]
    done = subprocess.run(
        [*python, "-m", "captioner.runtime", str(exported), *paths],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines == [[p, c] for p, c in zip(paths, drawn.captions.values(), strict=True)]
    code = "import sys, captioner.runtime; assert 'torch' not in sys.modules"
    subprocess.run([*python, "-c", code], env=environment, check=True)


def test_the_command_without_torch_tells_of_bad_images(exported, drawn, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    good = str(drawn.paths[0])
    assert runtime_main([str(exported), str(bad), good]) == 3
    streams = capsys.readouterr()
    assert streams.out == f"{good}\t{next(iter(drawn.captions.values()))}\n"
    assert "bad.png: not a readable image" in streams.err
    assert runtime_main([str(exported), str(bad)]) == 1
    assert runtime_main([str(tmp_path), good]) == 1
    assert "no exported captioner is there" in capsys.readouterr().err


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_folders_are_captioned_as_with_torch(exported, checkpoint, drawn, tmp_path):
    """With a bad image among them, a page to look at, and going on."""
    photos = Path(shutil.copytree(drawn.images, tmp_path / "photos"))
    (photos / "bad.png").write_bytes(b"no image")
    outputs = [tmp_path / f"{name}.jsonl" for name in ("torch", "onnx")]
    assert run_caption(checkpoint, photos, outputs[0], "--precision", "float32") == 3
    options = ("--gallery", tmp_path / "page.html", "--beam-size", 3)
    assert run_caption(exported, photos, outputs[1], *options) == 3
    expected, found = map(rows, outputs)
    assert len(found) == len(drawn.paths)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"log_probability", "score"}:
            assert ours[name] == theirs[name]
        assert ours["log_probability"] == pytest.approx(theirs["log_probability"], abs=1e-4)
    failures = rows(failures_path(outputs[1]))
    assert [Path(row["file_name"]).name for row in failures] == ["bad.png"]
    maps = [path.read_text() for path in (tmp_path / "page_files").glob("*.js")]
    assert len([text for text in maps if text.startswith("bringAttention(")]) == len(drawn.paths)
    shutil.copy(drawn.paths[0], photos / "new.png")
    assert run_caption(exported, photos, outputs[1], *options) == 3
    assert len(rows(outputs[1])) == len(drawn.paths) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runtime", "torch"), "is exported; use the checkpoint itself"),
        (("--samples", 3), "search.samples needs torch"),
        (("--ensemble", "other"), "--ensemble needs a checkpoint"),
    ],
)
def test_what_does_not_fit_is_one_line(exported, drawn, tmp_path, capsys, options, message):
    assert run_caption(exported, drawn.images, tmp_path / "captions.jsonl", *options) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_checkpoint_is_no_exported_captioner(checkpoint, drawn, capsys):
    words = [str(checkpoint), str(drawn.paths[0]), "--runtime", "onnx"]
    assert caption.main(words) == 2
    assert "isn't exported" in capsys.readouterr().err


def test_an_exported_folder_is_replaced_and_no_other(exported, checkpoint, tmp_path, capsys):
    target = tmp_path / "target"
    target.mkdir()
    assert export.main([str(checkpoint), str(target), "--precision", "float16"]) == 0
    assert "float16" in capsys.readouterr().out
    before = (target / "step.onnx").stat().st_size
    assert export.main([str(checkpoint), str(target)]) == 0
    assert (target / "step.onnx").stat().st_size > before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/dog.jpg").write_bytes(b"dog")
    assert export.main([str(checkpoint), str(tmp_path / "photos")]) == 2
    assert "not an exported captioner" in capsys.readouterr().err
    assert (tmp_path / "photos/dog.jpg").exists()
