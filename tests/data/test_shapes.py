import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from captioner.commands.check_shapes import main as check
from captioner.commands.shapes import main as make
from captioner.data import shapes, shapes_dataset
from captioner.data.annotations import read_annotations
from captioner.data.shape_captions import Verdict, captions_of, check_caption, parse_caption
from captioner.data.shapes import INVERSE, Scene, Thing
from captioner.errors import DataError

COUNTS = {"train": 60, "val": 20, "test": 30}
SCENE = Scene(Thing("small", "red", "circle"), Thing("large", "blue", "square"), "left of")
RIGHT = Verdict(readable=True, objects=True, colours=True, sizes=True, relation=True)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small data set, drawn once by the command."""
    folder = tmp_path_factory.mktemp("shapes") / "set"
    options = [f"--{split}={count}" for split, count in COUNTS.items()]
    assert make([str(folder), *options, "--image-size=48", "--seed=3"]) == 0
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records_of(folder, split):
    return shapes_dataset.read_records(folder / "annotations" / f"scenes_{split}.json")


def write_captions(path, captions):
    rows = [{"image_id": key, "caption": caption} for key, caption in captions.items()]
    path.write_text(json.dumps(rows))
    return str(path)


# --- the data set ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(drawn, tmp_path):
    shapes_dataset.write_data_set(tmp_path / "same", COUNTS, 48, seed=3)
    shapes_dataset.write_data_set(tmp_path / "other", COUNTS, 48, seed=4)
    expected, other = contents(drawn), contents(tmp_path / "other")
    assert contents(tmp_path / "same") == expected
    assert expected.keys() == other.keys()
    assert len(expected) == sum(COUNTS.values()) + 6
    assert all(other[name] != digest for name, digest in expected.items())


def test_captions_are_coco_captions_of_the_images(drawn):
    ids = []
    for split, count in COUNTS.items():
        annotations = read_annotations(drawn / "annotations" / f"captions_{split}.json")
        assert annotations.notes == []
        assert [len(set(image.captions)) for image in annotations.images] == [5] * count
        for image in annotations.images:
            with Image.open(drawn / "images" / split / image.file_name) as picture:
                assert (picture.size, picture.mode) == ((48, 48), "RGB")
        content = json.loads((drawn / "annotations" / f"captions_{split}.json").read_text())
        assert {(entry["width"], entry["height"]) for entry in content["images"]} == {(48, 48)}
        ids += [image.image_id for image in annotations.images]
    assert len(set(ids)) == sum(COUNTS.values())


def test_no_scene_and_no_image_is_in_two_splits(drawn):
    scenes = {split: {record.scene for record in records_of(drawn, split)} for split in COUNTS}
    assert not scenes["train"] & scenes["val"]
    assert not scenes["train"] & scenes["test"]
    assert not scenes["val"] & scenes["test"]
    # Nor is one hidden by naming its objects the other way round.
    swapped = {Scene(s.ground, s.figure, INVERSE[s.relation]) for s in scenes["train"]}
    assert not swapped & (scenes["val"] | scenes["test"])
    digests = [value for name, value in contents(drawn).items() if name.endswith(".png")]
    assert len(set(digests)) == sum(COUNTS.values())


def test_splits_stay_apart_when_there_are_more_images_than_scenes():
    counts = {"train": 9000, "val": 5000, "test": 3000}
    dealt = shapes_dataset.split_scenes(counts, np.random.default_rng(0))
    scenes = {split: {scene for _, scene in items} for split, items in dealt.items()}
    assert {split: len(items) for split, items in dealt.items()} == counts
    assert sum(map(len, scenes.values())) == len(set.union(*scenes.values()))
    assert sum(map(len, scenes.values())) == len(set(shapes.all_scenes()))


def test_all_words_and_relations_occur_about_equally_in_train():
    dealt = shapes_dataset.split_scenes(
        {"train": 2000, "val": 1, "test": 1}, np.random.default_rng(0)
    )
    scenes = [scene for _, scene in dealt["train"]]
    for kind, words in (
        ("size", shapes.SIZES),
        ("colour", shapes.COLOURS),
        ("shape", shapes.SHAPES),
    ):
        for thing in ("figure", "ground"):
            found = Counter(getattr(getattr(scene, thing), kind) for scene in scenes)
            assert found.keys() == set(words)
            assert min(found.values()) > 0.2 * len(scenes) / len(words)
    relations = Counter(scene.relation for scene in scenes)
    assert relations.keys() == INVERSE.keys()
    assert min(relations.values()) > 0.1 * len(scenes)


@pytest.mark.parametrize("image_size", [48, 64, 113])
def test_objects_are_where_their_record_says_in_their_colour(tmp_path, image_size):
    shapes_dataset.write_data_set(tmp_path / "set", {"train": 80, "val": 1, "test": 1}, image_size)
    for record in records_of(tmp_path / "set", "train"):
        path = tmp_path / "set" / "images" / "train" / record.file_name
        pixels = np.asarray(Image.open(path), dtype=float)
        first, second = record.objects
        for placed in record.objects:
            middle = pixels[int(placed.y), int(placed.x)]
            nearest = min(shapes.COLOURS, key=lambda name: distance(middle, shapes.COLOURS[name]))
            assert nearest == placed.colour
            assert distance(middle, placed.rgb) < 6 * shapes.NOISE
            assert 0 <= placed.x - placed.radius < placed.x + placed.radius <= image_size
            assert 0 <= placed.y - placed.radius < placed.y + placed.radius <= image_size
        # What isn't background lies within the two circles, and fills a good part of each.
        distances = np.linalg.norm(pixels - record.background, axis=2)
        seen = distances > 8 * shapes.NOISE
        circles = [inside(placed, image_size) for placed in record.objects]
        assert np.hypot(first.x - second.x, first.y - second.y) > first.radius + second.radius
        # A pixel that the outline cuts may have its centre outside.
        around = [inside(placed, image_size, beyond=1) for placed in record.objects]
        assert not seen[~(around[0] | around[1])].any()
        assert all(seen[circle].mean() > 0.25 for circle in circles)
        centres = [np.argwhere(seen & circle).mean(0) for circle in circles]
        assert true_relation(*centres) == record.relation
        covered = [
            (distances[circle] / distance(placed.rgb, record.background)).clip(0, 1).sum()
            for circle, placed in zip(circles, record.objects, strict=True)
        ]
        if first.size != second.size:
            assert first.size == "small"
            assert covered[0] < 0.85 * covered[1]


def distance(rgb, other):
    return float(np.linalg.norm(np.subtract(rgb, other)))


def inside(placed, image_size, beyond=0):
    rows, columns = np.mgrid[:image_size, :image_size] + 0.5
    return np.hypot(columns - placed.x, rows - placed.y) <= placed.radius + beyond


def true_relation(first, second):
    down, right = second - first
    if abs(right) > 1.5 * abs(down):
        return "left of" if right > 0 else "right of"
    assert abs(down) > 1.5 * abs(right), "diagonal: two relations seem true"
    return "above" if down > 0 else "below"


def test_a_set_is_replaced_but_other_files_are_not(drawn, tmp_path, capsys):
    folder = tmp_path / "set"
    few = ["--train=3", "--val=2", "--test=1"]
    assert make([str(folder), *few]) == 0
    assert make([str(folder), *few, "--seed=1"]) == 0
    (folder / "notes.txt").write_text("mine")
    assert make([str(folder), *few]) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "mine"
    assert make([str(folder / "notes.txt"), *few]) == 1


@pytest.mark.parametrize(
    ("option", "named"),
    [("--train=0", "--train"), ("--test=-1", "--test"), ("--image-size=8", "--image-size")],
)
def test_impossible_options_are_usage_errors(tmp_path, capsys, option, named):
    assert make([str(tmp_path / "set"), option]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_nothing_is_left_behind_when_drawing_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        shapes_dataset.write_data_set(tmp_path / "set", COUNTS)
    assert list(tmp_path.iterdir()) == []


def test_drawing_and_checking_need_no_torch():
    code = "import sys, captioner.commands.shapes, captioner.commands.check_shapes;"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- checking -------------------------------------------------------------------------------


def test_every_caption_of_every_scene_is_right():
    for scene in shapes.all_scenes():
        captions = captions_of(scene)
        assert len(set(captions)) == 5
        for caption in captions:
            assert check_caption(caption, scene) == RIGHT, caption
            assert check_caption(caption.lower().rstrip("."), scene) == RIGHT


def test_a_caption_of_another_scene_is_wrong():
    scenes = shapes.all_scenes()
    for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        for caption in captions_of(other):
            verdict = check_caption(caption, scene)
            assert verdict.readable
            assert not verdict.wholly_right, (caption, scene)


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a small red star to the left of a large blue square", {"objects"}),
        ("a small green circle to the left of a large blue square", {"colours"}),
        ("a large red circle to the left of a large blue square", {"sizes"}),
        ("a small red circle to the right of a large blue square", {"relation"}),
        ("a small red circle above a large blue square", {"relation"}),
        ("a large blue square is left of a small red circle", {"relation"}),
        ("there is a large blue square to the left of a small red circle", {"relation"}),
        ("to the left of a small red circle there is a large blue square", {"relation"}),
        ("a small red circle on the right and a large blue square on the left", {"relation"}),
        ("a small red circle at the top and a large blue square at the bottom", {"relation"}),
        ("a small blue circle to the left of a large red square", {"colours"}),
        ("a red circle to the left of a blue square", {"sizes"}),
        ("a small circle to the left of a large square", {"colours"}),
        ("a small red circle to the left of a small red circle", {"objects", "colours", "sizes"}),
    ],
)
def test_what_is_wrong_is_named(caption, wrong):
    verdict = check_caption(caption, SCENE)
    assert verdict.readable
    assert not verdict.wholly_right
    parts = ("objects", "colours", "sizes", "relation")
    assert {part for part in parts if not getattr(verdict, part)} == wrong


@pytest.mark.parametrize(
    "caption",
    [
        "",
        ".",
        "a small red circle",
        "a small red circle to the left of a large blue",
        "a small red circle to the left of a large blue square above a small red circle",
        "a small red circle and a large blue square",
        "a small red circle on the left and a large blue square on the left",
        "a small red circle on the left and a large blue square at the bottom",
        "a small small red circle to the left of a large blue square",
        "a small red circle to the left of a large blue square square",
        "circle red left square blue",
        "a man riding a wave on top of a surfboard",
        "<unk> red circle to the left of a large blue square",
    ],
)
def test_what_is_no_sentence_is_wholly_wrong(caption):
    assert parse_caption(caption) is None
    assert check_caption(caption, SCENE) == Verdict()


@pytest.mark.parametrize(
    "caption",
    [
        "A SMALL RED CIRCLE TO THE LEFT OF A LARGE BLUE SQUARE!",
        "there is a small red circle on the left of the large blue square",
        "the picture shows a large blue square right of a small red circle",
        "a large blue square that is to the right side of a small red circle",
        "left of a large blue square is a small red circle",
        "there is a large blue square on the right and a small red circle on the left",
    ],
)
def test_mixed_and_other_wordings_are_read(caption):
    assert check_caption(caption, SCENE) == RIGHT


def test_the_command_counts_right_and_wrong_captions(drawn, tmp_path, capsys):
    records = records_of(drawn, "test")
    scenes = str(drawn / "annotations" / "scenes_test.json")
    captions = {record.image_id: captions_of(record.scene)[2] for record in records}
    good = write_captions(tmp_path / "good.json", captions)
    arguments = ["--scenes", scenes, "--hypotheses", good]
    assert check([*arguments, "--at-least", "1"]) == 0
    assert "wholly right  1.0000" in capsys.readouterr().out

    first, second, third = list(captions)[:3]
    captions[first] = "a man riding a wave"
    captions[second] = captions[second].replace("small", "large")
    captions[second] = captions[second].replace("large", "small") + "?"
    del captions[third]
    output = tmp_path / "checked.json"
    spoilt = write_captions(tmp_path / "spoilt.json", captions)
    arguments = ["--scenes", scenes, "--hypotheses", spoilt, "--output", str(output)]
    assert check(arguments) == 0
    printed = capsys.readouterr()
    assert "a man riding a wave" in printed.err
    assert "1 of 30 pictures have no caption" in printed.err
    found = json.loads(output.read_text())
    sizes = {placed.size for placed in records[1].objects}
    wrong = 2 if sizes == {"small"} else 3
    assert len(found["wrong"]) == wrong
    assert found["wholly_right"] == pytest.approx(1 - wrong / 30)
    assert found["colours"] == pytest.approx(1 - 2 / 30)
    assert check([*arguments, "--at-least", "0.95"]) == 1
    assert check([*arguments, "--at-least", "0.9"]) == 0


def test_pictures_may_be_named_by_file_and_come_from_csv(drawn, tmp_path):
    records = records_of(drawn, "test")
    by_name = {record.file_name: captions_of(record.scene)[0] for record in records}
    scenes = str(drawn / "annotations" / "scenes_test.json")
    path = write_captions(tmp_path / "named.json", by_name)
    assert check(["--scenes", scenes, "--hypotheses", path, "--at-least", "1"]) == 0
    lines = [f"{record.image_id},{captions_of(record.scene)[0]}" for record in records]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["image_id,caption", *lines]))
    assert check(["--scenes", scenes, "--hypotheses", str(table), "--at-least", "1"]) == 0


def test_captions_that_fit_no_picture_are_refused(drawn, tmp_path, capsys):
    scenes = str(drawn / "annotations" / "scenes_test.json")
    record = records_of(drawn, "test")[0]
    stranger = write_captions(tmp_path / "stranger.json", {10**6: "a small red circle"})
    assert check(["--scenes", scenes, "--hypotheses", stranger]) == 1
    assert "1000000" in capsys.readouterr().err
    twice = {record.image_id: "a", record.file_name: "b"}
    double = write_captions(tmp_path / "double.json", twice)
    assert check(["--scenes", scenes, "--hypotheses", double]) == 1
    assert "two captions" in capsys.readouterr().err
    assert check(["--scenes", scenes, "--hypotheses", double, "--at-least", "90"]) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content.pop("scenes"), "not a file of scenes"),
        (lambda content: content["scenes"][0].pop("relation"), "scenes.0.relation"),
        (lambda content: content["scenes"][1]["objects"].pop(), "scenes.1.objects"),
        (lambda content: content["scenes"][2].update(relation="left off"), "'left of'"),
        (lambda content: content["scenes"][2]["objects"][0].update(colour="bleu"), "'blue'"),
        (lambda content: content["scenes"].append("?"), "scenes.30"),
    ],
)
def test_damaged_records_are_named(drawn, tmp_path, change, named):
    content = json.loads((drawn / "annotations" / "scenes_test.json").read_text())
    change(content)
    path = tmp_path / "scenes.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=named):
        shapes_dataset.read_records(path)
