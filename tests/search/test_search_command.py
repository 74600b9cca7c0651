"""Search settings as options of the command that captions a folder."""

import csv
import json

import pytest
from run_commands import run_caption
from step_models import contains

from captioner.data.predictions import read_predictions


def captions_of(checkpoint, drawn, output, *options):
    options = ("--precision", "float32", "--redo", *options)
    assert run_caption(checkpoint, drawn.images, output, *options) == 0
    return read_predictions(output)


def test_the_command_keeps_to_constraints(checkpoint, drawn, tmp_path):
    def texts(*options):
        captions = captions_of(checkpoint, drawn, tmp_path / "captions.json", *options)
        return [text.split() for text in captions.values()]

    long = ("--min-length", 6)
    assert any(len(set(words)) < len(words) for words in texts(*long))
    for words in texts(*long, "--no-repeat-ngram", 1):
        assert len(set(words)) == len(words) >= 6
    before, after = texts(), texts("--forbidden", "blue", "on white")
    assert any(contains(words, ("on", "white")) for words in before)
    assert not any("blue" in words or contains(words, ("on", "white")) for words in after)
    assert all(contains(words, ("green", "disc")) for words in texts("--forced", "green disc"))


def test_a_setting_whose_name_begins_with_no_has_an_opposite(
    checkpoint, captioner, drawn, tmp_path
):
    """--no-repeat-word and --repeat-word, whatever the checkpoint says."""
    long = {"min_length": 8, "max_length": 14}
    texts = [
        dict(
            zip(
                drawn.captions,
                captioner.caption(drawn.paths, no_repeat_word=forbids, **long),
                strict=True,
            )
        )
        for forbids in (False, True)
    ]
    assert texts[0] != texts[1]
    options = ["--min-length", 8, "--max-length", 14]
    for of_checkpoint in (False, True):
        config = json.loads((checkpoint / "config.json").read_text())
        config["search"]["no_repeat_word"] = of_checkpoint
        (checkpoint / "config.json").write_text(json.dumps(config))
        (checkpoint / "SHA256SUMS").unlink(missing_ok=True)
        for flags, forbids in (
            ([], of_checkpoint),
            (["--no-repeat-word"], True),
            (["--repeat-word"], False),
            (["--no-repeat-word", "--repeat-word"], False),
        ):
            found = captions_of(checkpoint, drawn, tmp_path / "c.json", *options, *flags)
            assert found == texts[forbids]


def test_the_command_writes_the_n_best(checkpoint, drawn, captioner, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    best = captions_of(checkpoint, drawn, output, "--n-best", 3, "--batch-size", 3)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    expected = captioner.describe(drawn.paths, n_best=3)
    for row, captions in zip(rows, expected, strict=True):
        assert row["captions"] == [caption.text for caption in captions]
        assert len(set(row["captions"])) == 3
        scores = [caption.log_probability for caption in captions]
        assert row["log_probabilities"] == pytest.approx(scores, abs=1e-4)
        scores = [caption.score for caption in captions]
        assert row["scores"] == pytest.approx(scores, abs=1e-4)
        assert row["caption"] == best[row["image_id"]] == row["captions"][0]
    other = tmp_path / "other.json"
    assert run_caption(checkpoint, drawn.images, other, "--n-best", 3) == 2
    assert "3 captions of an image (search.n_best) need a name that ends in .jsonl" in (
        capsys.readouterr().err
    )
    assert not other.exists()
    captions_of(checkpoint, drawn, tmp_path / "c.csv", "--n-best", 3, "--batch-size", 3)
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        cells = [json.loads(row["captions"]) for row in csv.DictReader(file)]
    assert cells == [row["captions"] for row in rows]


def test_the_command_says_when_nothing_is_found(checkpoint, drawn, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    options = ("--forced", "a red", "a blue", "--no-repeat-ngram", 1, "--n-best", 2)
    assert set(captions_of(checkpoint, drawn, output, *options).values()) == {""}
    assert "8 captions are empty, no caption that met the settings" in capsys.readouterr().err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(row["log_probabilities"] == row["scores"] == [None] for row in rows)


def test_the_command_samples_by_seed_and_image_alone(checkpoint, drawn, tmp_path):
    """Neither batches nor the order of images, nor which others there are, change a sample."""
    content = json.loads(drawn.annotations.read_text())
    listed, output = tmp_path / "listed.json", tmp_path / "captions.jsonl"

    def sampled(images, seed, batch_size):
        listed.write_text(json.dumps({"images": images, "annotations": []}))
        options = ("--annotations", listed, "--batch-size", batch_size, "--seed", seed)
        options += ("--samples", 4, "--n-best", 4, "--temperature", 6.0)
        captions_of(checkpoint, drawn, output, *options)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return {row["image_id"]: row["captions"] for row in rows}

    images = content["images"]
    first = sampled(images, 0, 8)
    assert len({text for captions in first.values() for text in captions}) > 16
    assert sampled(images, 0, 8) == first
    assert sampled(images[::-1], 0, 3) == first
    some = sampled(images[2:5], 0, 2)
    assert some == {image["id"]: first[image["id"]] for image in images[2:5]}
    assert sampled(images, 1, 8) != first
