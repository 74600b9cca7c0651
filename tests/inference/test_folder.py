"""Captioning a folder, through its command."""

import ast
import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw
from PIL import Image
from run_commands import run_caption

from captioner.commands import caption, evaluate
from captioner.data.listing import find_images
from captioner.data.predictions import read_predictions
from captioner.inference.folder import caption_files
from captioner.models.checkpoint import save_checkpoint

ODD_NAMES = {
    "été/cliché déjà vu.png": ("red", "disc"),
    "a, b; \"c\" 'd'.png": ("blue", "square"),
    "two\nlines.png": ("yellow", "square"),
    "猫 😺.PNG": ("lime", "disc"),
    "deep/er/still/x.y.png": ("blue", "disc"),
    "=1+1.png": ("red", "square"),
}
WORDS = {
    ("red", "disc"): "a red disc on white",
    ("blue", "square"): "a blue square",
    ("yellow", "square"): "a yellow square",
    ("lime", "disc"): "a bright green disc",
    ("blue", "disc"): "a blue disc",
    ("red", "square"): "a red square",
}


@pytest.fixture
def odd_folder(tmp_path):
    """Names of all kinds, folders in folders, hidden files, other files."""
    folder = tmp_path / "odd names"
    for name, drawing in ODD_NAMES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw(*drawing).save(folder / name, format="png")
    (folder / "notes.txt").write_text("no image")
    (folder / "._été.png").write_bytes(b"a macOS companion file")
    (folder / ".git").mkdir()
    draw("red", "disc").save(folder / ".git" / "hidden.png")
    return folder


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".JSON"])
def test_each_format_holds_every_name_and_caption(checkpoint, odd_folder, tmp_path, suffix, capsys):
    output = tmp_path / "new folder" / f"captions{suffix}"
    assert run_caption(checkpoint, odd_folder, output) == 0
    found = read_predictions(output)
    assert found == {name: WORDS[drawing] for name, drawing in ODD_NAMES.items()}
    said = capsys.readouterr()
    assert said.out == f"6 captions in {output}\n"
    assert "2 files are passed over" in said.err


def test_columns_of_the_formats(checkpoint, drawn, tmp_path):
    for suffix in (".json", ".jsonl", ".csv"):
        run_caption(checkpoint, drawn.images, tmp_path / f"c{suffix}")
    rows = json.loads((tmp_path / "c.json").read_text())
    assert all(row.keys() == {"image_id", "caption"} for row in rows)  # as COCO's server wants it
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    for line, row in zip(lines, cells, strict=True):
        assert {name: str(value) for name, value in line.items()} == row
        with Image.open(drawn.images / line["file_name"]) as image:
            assert (line["width"], line["height"]) == image.size
        assert -0.1 < line["log_probability"] <= 0
    assert [row["file_name"] for row in lines] == list(drawn.captions)
    assert [row["caption"] for row in lines] == list(drawn.captions.values())


def test_unreadable_files_are_named_and_the_rest_is_there(checkpoint, drawn, tmp_path, capsys):
    folder, output = tmp_path / "some bad", tmp_path / "captions.json"
    shutil.copytree(drawn.images, folder)
    cut, empty, text = (folder / name for name in ("cut.png", "empty.jpg", "text.jpeg"))
    cut.write_bytes((folder / "04_blue_disc.png").read_bytes()[:60])
    empty.write_bytes(b"")
    text.write_text("not an image")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nothing.png")
    assert run_caption(checkpoint, folder, output, "--batch-size", 2, "--workers", 1) == 3
    assert read_predictions(output) == drawn.captions
    errors = capsys.readouterr().err
    for name in ("cut.png", "empty.jpg", "text.jpeg", "loop.png", "gone.png"):
        assert errors.count(f"warning: {folder / name}: ") == 1
    last = errors.splitlines()[-1]
    assert last.startswith("5 of 13 images could not be captioned: cut.png, ")


@pytest.mark.parametrize("ensemble", [False, True])
def test_an_image_that_gives_nan_is_one_failed_image(
    overflowing_model, checkpoint, drawn, tmp_path, capsys, ensemble
):
    folder, output, without = (tmp_path / name for name in ("mixed", "mixed.jsonl", "good.jsonl"))
    shutil.copytree(drawn.images, folder)
    Image.new("RGB", (64, 64)).save(folder / "03 black.png")
    (tmp_path / "overflowing").mkdir()
    save_checkpoint(overflowing_model, tmp_path / "overflowing", {})
    options = ["--ensemble", checkpoint] if ensemble else []
    options += ["--n-best", 3, "--precision", "float32"]
    assert run_caption(tmp_path / "overflowing", drawn.images, without, *options) == 0
    assert run_caption(tmp_path / "overflowing", folder, output, *options) == 3
    found, expected = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (output, without)
    )
    assert read_predictions(output) == drawn.captions
    for row, other in zip(found, expected, strict=True):
        for name in ("log_probabilities", "scores"):  # rounding depends on the batch
            assert row.pop(name) == pytest.approx(other.pop(name), abs=1e-4)
        assert row == other
    warning, last = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {folder / '03 black.png'}: the model gives NaN")
    expected = "1 of 9 images could not be captioned: 03 black.png; reasons in "
    assert last == f"{expected}{output}.failures.jsonl"


@pytest.mark.parametrize("output", ["captions.csv", "captions.json"])
def test_where_no_image_can_be_captioned_no_results_are_there(checkpoint, tmp_path, capsys, output):
    folder, output = tmp_path / "bad", tmp_path / output
    folder.mkdir()
    for name in ("a.jpg", "b.png"):
        (folder / name).write_bytes(b"\xff\xd8\xff")
    assert run_caption(checkpoint, folder, output) == 1
    assert not output.exists()
    shown = capsys.readouterr()
    assert [line.partition(": ")[0] for line in shown.err.splitlines()] == [
        *("warning", "warning", "error")
    ]
    reasons = f"reasons in {output}.failures.jsonl"
    assert shown.err.endswith(f"error: none of 2 images could be captioned; {reasons}\n")
    assert shown.out == ""
    assert len(Path(f"{output}.failures.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("case", ["no folder", "empty", "no image"])
def test_nothing_to_caption_is_an_error(checkpoint, tmp_path, capsys, case):
    folder, output = tmp_path / "folder", tmp_path / "captions.json"
    if case != "no folder":
        folder.mkdir()
    if case == "no image":
        (folder / "a.txt").write_text("")
        (folder / ".b.png").write_text("")
    assert run_caption(checkpoint, folder, output) == 1
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {folder}: no ")
    assert len(warnings) == (case != "no folder")
    assert not output.exists()


# --- files, several inputs, no output ---------------------------------------------------------


def caption_lines(capsys, *words: object) -> list[str]:
    assert caption.main([str(word) for word in (*words, "--device", "cpu", "--workers", 0)]) == 0
    return capsys.readouterr().out.splitlines()


def test_one_image_is_captioned_on_the_terminal(checkpoint, drawn, tmp_path, capsys):
    path = drawn.paths[2]
    text = drawn.captions[path.name]
    assert caption_lines(capsys, checkpoint, path) == [f"{path}\t{text}"]
    unusual = tmp_path / "a name without a suffix"  # asked for by name: the suffix doesn't matter
    shutil.copy(path, unusual)
    assert caption_lines(capsys, checkpoint, unusual) == [f"{unusual}\t{text}"]


def test_files_and_folders_are_captioned_together(checkpoint, drawn, tmp_path, capsys, monkeypatch):
    """Ids are the paths as they were given: the same names in two folders don't collide."""
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two/deep"):
        shutil.copytree(drawn.images, folder)
    names = list(drawn.captions)
    texts = list(drawn.captions.values())
    single = f"one/{names[3]}"
    ids = [single, *(f"two/deep/{n}" for n in names), *(f"one/{n}" for n in names if n != names[3])]
    words = [single, "two", "./one", single]
    options = ["--output", "c.json", "--beam-size", 3]
    assert caption_lines(capsys, checkpoint, *words, *options) == ["16 captions in c.json"]
    found = read_predictions("c.json")
    assert list(found) == ids
    assert found == {image_id: drawn.captions[Path(image_id).name] for image_id in ids}
    # Options may stand between them; of a single folder, ids are the paths below it.
    expected = [f"deep/{name}\t{text}" for name, text in zip(names, texts, strict=True)]
    assert caption_lines(capsys, checkpoint, "--beam-size", 3, "two") == expected
    expected = [f"{name}\t{text}" for name, text in zip(names, texts, strict=True)]
    monkeypatch.chdir("one")
    assert caption_lines(capsys, checkpoint, ".", names[0]) == expected


def test_each_input_must_be_there(tmp_path, drawn, capsys):
    """Before the checkpoint is looked for."""
    words = ["--checkpoint", tmp_path / "none", *drawn.paths[:2], tmp_path / "gone.jpg"]
    assert caption.main([str(word) for word in words]) == 1
    expected = f"error: {tmp_path / 'gone.jpg'}: no such file or folder\n"
    assert capsys.readouterr().err == expected


def test_a_run_stands_for_its_best_checkpoint(checkpoint, drawn, tmp_path, capsys):
    best = tmp_path / "run" / "best"
    checkpoint.rename(best.parent.mkdir() or best)
    words = [best.parent, drawn.paths[0], "--ensemble", best.parent, "--device", "cpu"]
    assert caption.main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{drawn.paths[0]}\t{drawn.captions[drawn.paths[0].name]}\n"
    line = f"{best.parent} is the folder of a run: its best checkpoint is used, {best}\n"
    assert shown.err == 2 * line
    shutil.rmtree(best)
    (best.parent / "run.json").write_text("{}")
    assert caption.main([str(word) for word in words]) == 1
    assert capsys.readouterr().err == f"{2 * line}error: {best}: no such checkpoint directory\n"


def test_several_captions_of_an_image_are_printed_with_their_scores(
    checkpoint, captioner, drawn, capsys
):
    options = ["--n-best", 3, "--precision", "float32"]
    lines = caption_lines(capsys, checkpoint, drawn.paths[0], *options)
    captions = captioner.describe(drawn.paths[0], n_best=3)
    for line, best in zip(lines, captions, strict=True):
        name, text, score = line.split("\t")
        assert (name, text) == (str(drawn.paths[0]), best.text)
        assert float(score) == pytest.approx(best.score, abs=1e-3)
    scores = [best.score for best in captions]
    assert scores == sorted(scores, reverse=True)


def test_names_are_printed_escaped(checkpoint, tmp_path, capsys):
    names = ["two\nlines\t.png", "\x1b[2J.png", "\u202egnp.png", "\x9bm.png", "été 猫.png"]
    for name in names:
        draw("red", "square").save(tmp_path / name)
        (tmp_path / f"bad {name}").write_text("")
    words = [checkpoint, *(tmp_path / name for name in names)]
    words += [tmp_path / f"bad {name}" for name in names]
    assert caption.main([str(word) for word in words]) == 3
    shown = capsys.readouterr()
    escaped = [r"two\nlines\t.png", r"\x1b[2J.png", r"\u202egnp.png", r"\x9bm.png", "été 猫.png"]
    assert shown.out.splitlines() == [f"{tmp_path}/{name}\ta red square" for name in escaped]
    lines = shown.err.splitlines()
    for line, name in zip(lines[:-1], escaped, strict=True):
        assert line.startswith(f"warning: {tmp_path}/bad {name}: ")
    assert all(name in lines[-1] for name in escaped)


def test_output_into_a_name_that_is_not_utf8(checkpoint, drawn, tmp_path, capsys):
    output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.csv"))
    assert run_caption(checkpoint, drawn.images, output) == 0
    assert read_predictions(output) == drawn.captions
    assert capsys.readouterr().out == f"8 captions in {tmp_path}/caf\\udce9.csv\n"


def test_cells_that_a_spreadsheet_takes_for_formulas(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for name in ("=1+1.png", "-2.png", "@a.png", "+b.png", "c=d.png", "\tt.png", "\rr.png"):
        draw("red", "square").save(Path("images", name))
    assert run_caption(checkpoint, "images", "plain.csv") == 0
    assert run_caption(checkpoint, "images", "safe.csv", "--csv-safe") == 0
    plain = read_predictions("plain.csv")
    expected = {f"'{name}" if name != "c=d.png" else name: text for name, text in plain.items()}
    assert read_predictions("safe.csv") == expected


def test_subfolders_that_cannot_be_read_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "open").mkdir()
    (tmp_path / "shut").mkdir()
    draw("red", "disc").save(tmp_path / "open" / "a.png")

    def scandir(path, scandir=os.scandir):  # root may read everything, so refuse it here
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [image.name for image in find_images(tmp_path)] == ["open/a.png"]
    error = capsys.readouterr().err
    assert f"{tmp_path / 'shut'}: this folder can't be read (Permission denied)" in error


# --- with --annotations -----------------------------------------------------------------------


def test_annotations_choose_the_images_and_their_ids(checkpoint, drawn, tmp_path):
    content = json.loads(drawn.annotations.read_text())
    content["images"] = content["images"][5:1:-1]  # some, in another order
    kept = [image["id"] for image in content["images"]]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    some = tmp_path / "some.json"
    some.write_text(json.dumps(content))
    output = tmp_path / "captions.json"
    assert run_caption(checkpoint, drawn.images, output, "--annotations", some) == 0
    expected = {i["id"]: drawn.captions[i["file_name"]] for i in content["images"]}
    assert list(read_predictions(output).items()) == list(expected.items())

    for entry in (*content["images"], *content["annotations"]):
        key = "image_id" if "image_id" in entry else "id"
        entry[key] = f"img-{entry[key]:04}"
    some.write_text(json.dumps(content))
    assert run_caption(checkpoint, drawn.images, output, "--annotations", some) == 2
    assert run_caption(checkpoint, drawn.images, output, "--annotations", some, "--redo") == 0
    assert list(read_predictions(output)) == [f"img-{number:04}" for number in expected]


def test_results_are_evaluated_as_they_are(checkpoint, drawn, tmp_path, capsys):
    for suffix in (".json", ".jsonl", ".csv"):
        output, scores = tmp_path / f"captions{suffix}", tmp_path / "scores.json"
        assert (
            run_caption(checkpoint, drawn.images, output, "--annotations", drawn.annotations) == 0
        )
        words = ["--references", drawn.annotations, "--hypotheses", output, "--output", scores]
        assert evaluate.main([str(word) for word in words]) == 0
        found = json.loads(scores.read_text())
        assert found["BLEU-1"] == pytest.approx(1.0)
        assert found["images"] == 8
    assert "BLEU-4" in capsys.readouterr().out


def test_listed_but_missing_images_are_named(checkpoint, drawn, tmp_path, capsys):
    content = json.loads(drawn.annotations.read_text())
    content["images"].append({"id": 999, "file_name": "not here.jpg"})
    listed, output = tmp_path / "listed.json", tmp_path / "captions.json"
    listed.write_text(json.dumps(content))
    assert run_caption(checkpoint, drawn.images, output, "--annotations", listed) == 3
    assert len(read_predictions(output)) == 8
    error = capsys.readouterr().err
    assert f"{drawn.images / 'not here.jpg'}: no such file" in error
    assert "1 of 9 images could not be captioned: not here.jpg" in error


def test_a_split_of_csv_annotations(checkpoint, drawn, tmp_path, capsys):
    rows = [
        f"{name},{text},{'test' if 'disc' in name else 'train'}"
        for name, text in drawn.captions.items()
    ]
    listed, output = tmp_path / "captions.csv", tmp_path / "out.json"
    listed.write_text("\n".join(["image,caption,split", *rows]))
    options = ["--annotations", listed, "--split"]
    assert run_caption(checkpoint, drawn.images, output, *options, "test") == 0
    assert read_predictions(output) == {n: t for n, t in drawn.captions.items() if "disc" in n}
    assert run_caption(checkpoint, drawn.images, output, *options, "tset") == 1
    assert "did you mean 'test'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"images": []}, "it lists no images"),
        ({"images": [{"id": 3}, {"id": 4, "file_name": "a.png"}]}, r"1 images .* \(ids 3\)"),
        ("{", "not valid JSON"),
    ],
)
def test_annotations_that_list_nothing(checkpoint, drawn, tmp_path, capsys, content, expected):
    listed = tmp_path / "listed.json"
    listed.write_text(content if isinstance(content, str) else json.dumps(content))
    assert run_caption(checkpoint, drawn.images, tmp_path / "o.json", "--annotations", listed) == 1
    error = capsys.readouterr().err
    assert re.search(expected, error)
    assert str(listed) in error


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "options", "expected"),
    [
        ("captions.txt", [], "must end in .json, .jsonl, .csv or .sqlite, found '.txt'"),
        ("captions", [], "must end in .json, .jsonl, .csv or .sqlite, found 'captions'"),
        ("folder.json", [], "folder.json: this is a folder"),
        ("taken/captions.json", [], "taken/captions.json: can't be written"),
        ("new/c.json", ["--split", "test"], "--annotations, which is missing"),
        ("new/c.json", ["--batch-size", "-1"], "--batch-size: at least 0 was expected, found -1"),
        ("new/c.json", ["--csv-safe"], "--csv-safe needs an --output whose name ends in .csv"),
        ("c.json", ["x", "--annotations", "a.json"], "needs exactly one folder, found 3 inputs"),
    ],
)
def test_wrong_usage_is_refused_before_any_work(tmp_path, capsys, output, options, expected):
    """Neither checkpoint nor folder is there: looking for them would be work."""
    (tmp_path / "taken").write_text("old")
    (tmp_path / "folder.json").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run_caption(tmp_path / "none", tmp_path / "none", tmp_path / output, *options) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--beam-size", 0], "beam_size: at least 1"),
        (["--max-length", 0], "max_length: at least 1"),
        (["--device", "tpu9"], "device 'tpu9' can't be used here"),
    ],
)
def test_impossible_settings_are_one_line(checkpoint, drawn, tmp_path, capsys, option, expected):
    assert run_caption(checkpoint, drawn.images, tmp_path / "c.json", *option) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_search_options_reach_the_search(checkpoint, drawn, tmp_path):
    output = tmp_path / "captions.json"
    assert run_caption(checkpoint, drawn.images, output, "--max-length", 2, "--beam-size", 1) == 0
    assert set(read_predictions(output).values()) == {"a red", "a bright", "a blue", "a yellow"}


def test_the_output_appears_whole_or_not_at_all(checkpoint, drawn, tmp_path, monkeypatch, capsys):
    output = tmp_path / "captions.json"
    output.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run_caption(checkpoint, drawn.images, output, "--redo") == 1
    monkeypatch.undo()
    assert "error: writing: No space left on device" in capsys.readouterr().err
    assert output.read_text() == "old"
    names = ["captions.json", "captions.json.journal", "checkpoint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").unlink()
    assert run_caption(checkpoint, drawn.images, output, "--redo") == 1
    assert output.read_text() == "old"
    (checkpoint / "model.safetensors").write_bytes(weights)
    capsys.readouterr()
    assert run_caption(checkpoint, drawn.images, output, "--redo") == 0
    assert read_predictions(output) == drawn.captions


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from captioner import Captioner
from captioner.data.listing import find_images
from captioner.inference.folder import caption_files
from captioner.memory import give_back_freed_memory

resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))  # a limit, if not yet one to be met
images = find_images(sys.argv[2])
captioner = Captioner.from_pretrained(sys.argv[1], "cpu", "float32")
search = captioner.search(beam_size=8000)
# All libraries are loaded and ready, and the CNN has met such batches.
caption_files(captioner, images, captioner.search(beam_size=1), len(images), workers=0)
caption_files(captioner, images[:1], search, 1, workers=0)
give_back_freed_memory()  # how much of it is kept differs from run to run
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
captions, failed = caption_files(captioner, images, search, len(images), workers=0)
assert not failed
print([best[0].text for best in captions.values()])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
def test_batches_are_halved_where_memory_runs_out(checkpoint, tmp_path, captioner, drawn):
    """With a real limit on the process's memory."""
    for number in range(3):
        for name in drawn.captions:
            (tmp_path / "images").mkdir(exist_ok=True)
            shutil.copy(drawn.images / name, tmp_path / "images" / f"{number} {name}")
    images = find_images(tmp_path / "images")
    search = captioner.search(beam_size=8000)
    found, _ = caption_files(captioner, images, search, 4)
    expected = [best[0].text for best in found.values()]

    def limited(megabytes: int) -> subprocess.CompletedProcess:
        words = [str(checkpoint), str(tmp_path / "images"), str(megabytes << 20)]
        return subprocess.run(
            [sys.executable, "-c", OUT_OF_MEMORY, *words], capture_output=True, text=True
        )

    ample = limited(4000)
    assert ample.returncode == 0, ample.stderr
    assert "out of memory" not in ample.stderr
    hopeless = limited(20)
    assert hopeless.returncode == 1
    assert "CaptionerError: cpu has too little memory for one image" in hopeless.stderr
    # How much one image needs differs between processors: oneDNN prepares programs for each size.
    scarce = next(run for run in map(limited, (250, 350, 500)) if run.returncode == 0)
    assert "warning: out of memory with 24 images at a time: going on with 12" in scarce.stderr
    assert ast.literal_eval(ample.stdout) == ast.literal_eval(scarce.stdout) == expected
