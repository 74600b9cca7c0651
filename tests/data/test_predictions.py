import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.data.annotations import read_annotations
from captioner.data.predictions import read_predictions, write_predictions
from captioner.errors import DataError, UsageError

HARD = {
    'a "quoted", caption': 'she said "hi, there", twice',
    "héé 猫 🐈.jpg": "两只猫\nand a line break\r\nand another\rone\u2028more",
    " lead": " lead and trail ",
    "n": "",
    "tab\tid": "\ttab\0nul",
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".JSON"])
def test_text_ids_survive_a_round_trip(tmp_path, suffix):
    path = tmp_path / f"results{suffix}"
    write_predictions(
        path, [{"image_id": i, "caption": c, "file_name": i} for i, c in HARD.items()]
    )
    assert read_predictions(path) == HARD


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_integer_ids_stay_integers_and_other_fields_are_kept(tmp_path, suffix):
    path = tmp_path / f"results{suffix}"
    write_predictions(path, [{"image_id": 7, "caption": "a dog", "score": -1.5}])
    assert read_predictions(path) == {7: "a dog"}
    content = json.loads(path.read_text())
    row = content[0] if suffix == ".json" else content
    assert row == {"image_id": 7, "caption": "a dog", "score": -1.5}


def test_csv_keeps_columns_and_reads_ids_as_text(tmp_path):
    path = tmp_path / "results.csv"
    write_predictions(path, [{"image_id": 7, "caption": "a, b", "file_name": "7.jpg"}])
    assert path.read_text().splitlines() == ["image_id,caption,file_name", '7,"a, b",7.jpg']
    assert read_predictions(path) == {"7": "a, b"}


def test_csv_may_name_images_as_captions_files_do(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("\ufeffimage,caption\n1.jpg,a dog\n\n", encoding="utf-8")
    assert read_predictions(path) == {"1.jpg": "a dog"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_no_rows_is_a_file_all_the_same(tmp_path, suffix):
    write_predictions(tmp_path / f"empty{suffix}", [])
    assert read_predictions(tmp_path / f"empty{suffix}") == {}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_file_name_that_is_not_utf8_is_written(tmp_path, suffix):
    path = tmp_path / f"results{suffix}"
    write_predictions(path, [{"image_id": 1, "caption": "a", "file_name": "caf\udce9.jpg"}])
    assert len(read_predictions(path)) == 1
    assert "udce9" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"image_id": 1, "caption": "a"}', "line 1"),
        ("a.json", '{"image_id": 1}', "found an object"),
        ("a.json", "3", "found 3"),
        ("a.json", "[3]", "entry 0"),
        ("a.json", '[{"image_id": 1, "caption": "a"}, {"caption": "a"}]', "entry 1: no 'image_id'"),
        ("a.json", '[{"image_id": 1}]', "no 'caption'"),
        ("a.json", '[{"image_id": true, "caption": "a"}]', "integer or text, found True"),
        ("a.json", '[{"image_id": 1.5, "caption": "a"}]', "integer or text, found 1.5"),
        ("a.json", '[{"image_id": 1, "caption": null}]', "'caption' of image 1 must be text"),
        ("a.json", "[" * 100_000, "a.json"),
        ("a.json", '[{"image_id": ' + "1" * 5000 + ', "caption": "a"}]', "a.json"),
        ("a.jsonl", '{"image_id": 1, "caption": "a"}\n\n{"image_id"\n', "line 3"),
        ("a.jsonl", '{"image_id": 1, "caption": "a"}\n[]\n', "line 2"),
        ("a.csv", "", "empty"),
        ("a.csv", "id,text\n1,a\n", "line 1"),
        ("a.csv", "image_id,caption\n1,a,b\n", "line 2"),
        ("a.csv", 'image_id,caption\n1,"a\n', "not valid CSV"),
    ],
)
def test_malformed_files_are_refused_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        read_predictions(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_captions_of_any_length_are_read(tmp_path):
    """Beyond the 131,072 characters that csv takes of itself."""
    text = "a dog " * 50_000
    write_predictions(tmp_path / "long.csv", [{"image_id": "a.jpg", "caption": text}])
    csv.field_size_limit(131_072)
    assert read_predictions(tmp_path / "long.csv") == {"a.jpg": text}
    (tmp_path / "captions.csv").write_text(f"image,caption\na.jpg,{text}\n")
    csv.field_size_limit(131_072)
    (image,) = read_annotations(tmp_path / "captions.csv").images
    assert image.captions == [text.strip()]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_double_ids_are_counted_and_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    rows = [{"image_id": i, "caption": "a"} for i in range(8)]
    write_predictions(path, rows)
    text = path.read_text()
    if suffix == ".json":
        path.write_text(json.dumps(rows + rows[:7]))
    else:
        path.write_text(text + "".join(text.splitlines(keepends=True)[-7:]))
    with pytest.raises(DataError, match=r"7 image ids come more than once .* and 2 more"):
        read_predictions(path)


def test_writing_refuses_what_reading_would(tmp_path):
    with pytest.raises(DataError, match="row 1"):
        write_predictions(tmp_path / "a.json", [{"image_id": 1, "caption": ""}, {"image_id": 2}])
    with pytest.raises(DataError, match="more than once"):
        write_predictions(tmp_path / "a.json", [{"image_id": 1, "caption": ""}] * 2)
    assert not list(tmp_path.iterdir())


def test_unknown_suffix_names_the_three(tmp_path):
    for use in (read_predictions, lambda path: write_predictions(path, [])):
        with pytest.raises(UsageError, match=r"\.json, \.jsonl or \.csv.*'\.txt'"):
            use(tmp_path / "a.txt")


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_predictions(tmp_path / "a.csv")


@settings(max_examples=50, deadline=None)
@given(
    rows=st.dictionaries(st.text(), st.text(), max_size=4),
    suffix=st.sampled_from([".json", ".jsonl"]),
)
def test_any_text_survives(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.mktemp("any") / f"r{suffix}"
    write_predictions(path, [{"image_id": key, "caption": text} for key, text in rows.items()])
    assert read_predictions(path) == rows
