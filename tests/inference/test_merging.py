"""Parts of a job, joined."""

import json
import shutil
from pathlib import Path

import pytest
from run_commands import run_caption

from captioner.commands import merge
from captioner.data.predictions import read_predictions


def run_merge(*words: object) -> int:
    return merge.main([str(word) for word in words])


@pytest.fixture
def parts(checkpoint, drawn, tmp_path):
    """A job over a folder with an image that can't be read; whole, and in three parts."""
    folder = Path(shutil.copytree(drawn.images, tmp_path / "photos"))
    (folder / "02b.png").write_text("no image")
    options = ["--n-best", 2, "--hash", "--batch-size", 1]  # rounding depends on the batch
    assert run_caption(checkpoint, folder, tmp_path / "whole.jsonl", *options) == 3
    found = []
    for number in (1, 2, 3):
        found.append(tmp_path / f"{number}.jsonl")
        run_caption(checkpoint, folder, found[-1], "--shard", f"{number}/3", *options)
    return found


def test_the_parts_give_the_whole(parts, tmp_path, capsys):
    outputs = [tmp_path / f"all.{kind}" for kind in ("jsonl", "csv", "json", "sqlite")]
    found = ["--images", tmp_path / "photos", "--output", *outputs]
    assert run_merge(*parts, *found) == 3
    shown = capsys.readouterr()
    assert shown.out.endswith("".join(f"8 captions in {path}\n" for path in outputs))
    assert shown.err.endswith(
        f"1 images could not be captioned; reasons in {outputs[0]}.failures.jsonl\n"
    )
    assert outputs[0].read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    failures = [tmp_path / f"{name}.jsonl.failures.jsonl" for name in ("all", "whole")]
    assert failures[0].read_bytes() == failures[1].read_bytes()
    whole = read_predictions(tmp_path / "whole.jsonl")
    assert read_predictions(outputs[1]) == read_predictions(outputs[2]) == whole


def test_what_no_part_has_is_named(parts, tmp_path, capsys):
    lost = [json.loads(line)["file_name"] for line in parts[1].read_text().splitlines()]
    words = [parts[0], parts[2], "--output", tmp_path / "all.jsonl"]
    assert run_merge(*words, "--images", tmp_path / "photos") == 3
    error = capsys.readouterr().err
    for name in lost:
        assert name in error
    assert "images are missing: no part has" in error


def test_parts_that_disagree_are_refused(parts, tmp_path, capsys):
    words = [parts[0], parts[0], "--output", tmp_path / "all.jsonl"]
    run_merge(*words)  # the same twice is no contradiction
    line = json.loads(parts[0].read_text().splitlines()[0])
    (tmp_path / "other.jsonl").write_text(json.dumps(line | {"caption": "something else"}) + "\n")
    before = (tmp_path / "all.jsonl").read_bytes()
    assert run_merge(tmp_path / "other.jsonl", *words) == 1
    error = capsys.readouterr().err
    assert f"{parts[0]}: line 1: another part has 'something else'" in error
    for content, expected in (("{", "line 1: not valid JSON"), ("{}", "image_id and caption")):
        (tmp_path / "other.jsonl").write_text(content)
        assert run_merge(tmp_path / "other.jsonl", *words) == 1
        assert expected in capsys.readouterr().err
    assert (tmp_path / "all.jsonl").read_bytes() == before
    assert run_merge(parts[0], "--output", parts[0]) == 2
    assert run_merge(parts[0], "--output", tmp_path / "a.txt") == 2
    assert run_merge(tmp_path / "none.jsonl", "--output", tmp_path / "a.csv") == 1
