"""Captions files in all their forms; what is malformed is named with file, place and count."""

import json
from pathlib import Path

import pytest

from captioner.data.annotations import image_path, read_annotations
from captioner.errors import DataError
from captioner.files import read_json

FLICKR8K = Path(__file__).parents[2] / ".." / "shared" / "data" / "flickr8k"

COCO = {
    "info": {},
    "images": [
        {"id": 9, "file_name": "nine.jpg", "width": 4, "height": 3},
        {"id": 2, "file_name": "two.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 2, "caption": " Two dogs. \n"},
        {"id": 2, "image_id": 9, "caption": "Nine cats."},
        {"id": 3, "image_id": 2, "caption": "Dogs, two of them."},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": "a.jpg",
            "cocoid": 31,
            "imgid": 0,
            "split": "train",
            "sentences": [{"raw": "An a.", "tokens": ["an", "a"], "sentid": 7}],
        },
        {"filename": "b.jpg", "imgid": 1, "split": "restval", "sentences": [{"raw": "A b."}]},
        {"filename": "c.jpg", "split": "test", "sentences": [{"raw": "A c."}, {"raw": "C."}]},
    ],
}


@pytest.fixture
def write(tmp_path):
    """Write a file of the test's own; JSON unless it is text or bytes."""

    def write_file(content, name="captions.json"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_bytes(text.encode())
        return path

    return write_file


def rows(annotations):
    return [(image.image_id, image.file_name, image.captions) for image in annotations.images]


def refusal(path, split=None):
    with pytest.raises(DataError) as caught:
        read_annotations(path, split)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def changed(content, **entries):
    return {**json.loads(json.dumps(content)), **entries}


# --- COCO -----------------------------------------------------------------------------------


def test_coco(write, capsys):
    read = read_annotations(write(COCO))
    assert rows(read) == [
        (9, "nine.jpg", ["Nine cats."]),
        (2, "two.jpg", ["Two dogs.", "Dogs, two of them."]),
    ]
    assert read.notes == []
    assert capsys.readouterr().out == ""  # pycocotools likes to talk


def test_coco_with_text_ids_and_no_file_names(write):
    content = {
        "images": [{"id": "é 1"}, {"id": 7, "file_name": "7.jpg"}],
        "annotations": [
            {"id": "x", "image_id": "é 1", "caption": "a"},
            {"id": 1, "image_id": 7, "caption": "b"},
        ],
    }
    assert rows(read_annotations(write(content))) == [("é 1", None, ["a"]), (7, "7.jpg", ["b"])]


def test_coco_captions_need_no_id_and_categories_do_no_harm(write):
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": " "}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    read = read_annotations(write(content))
    assert rows(read) == [(1, "1.jpg", ["a"])]
    assert "1 empty captions left out (ids annotations[1])" in read.notes[0]


def test_coco_without_annotations_is_a_list_of_images(write):
    path = write({"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(7)]})
    read = read_annotations(path)
    assert rows(read)[6] == (6, "6.jpg", [])
    assert read.notes == [f"{path}: 7 images have no caption (ids 0, 1, 2, 3, 4 and 2 more)"]


def test_empty_captions_and_images_without_one_are_reported_with_ids_and_counts(write):
    annotations = [
        {"id": 10 + i, "image_id": 2, "caption": text} for i, text in enumerate(["", " \n", "x"])
    ]
    path = write(changed(COCO, annotations=annotations))
    read = read_annotations(path)
    assert rows(read) == [(9, "nine.jpg", []), (2, "two.jpg", ["x"])]
    assert read.notes == [
        f"{path}: 2 empty captions left out (ids 10, 11)",
        f"{path}: 1 images have no caption (ids 9)",
    ]


def test_captions_that_name_unknown_images(write):
    extra = [{"id": i, "image_id": f"no{i}", "caption": "x"} for i in range(6)]
    message = refusal(write(changed(COCO, annotations=COCO["annotations"] + extra)))
    assert "6 image ids that 'images' doesn't list (no0, no1, no2, no3, no4 and 1 more)" in message


def test_double_image_ids(write):
    images = [*COCO["images"], {"id": 9, "file_name": "other.jpg"}]
    assert refusal(write(changed(COCO, images=images))) == "1 image ids are listed twice (9)"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"images": {}}, "'images' must be a list, found dict"),
        ({"annotations": None}, "'annotations' must be a list, found NoneType"),
        ({"images": [3]}, "images[0] must be an object, found 3"),
        ({"images": [{"file_name": "a.jpg"}]}, "images[0] (id None): 'id' must be integer or text"),
        ({"images": [{"id": True}]}, "'id' must be integer or text, found True"),
        ({"images": [{"id": 1.5}]}, "'id' must be integer or text, found 1.5"),
        ({"annotations": [{"id": 4, "image_id": 9}]}, "annotations[0] (id 4): 'caption' must be"),
        (
            {"annotations": [{"id": 4, "image_id": 9, "caption": ["x"]}]},
            "annotations[0] (id 4): 'caption' must be text, found ['x']",
        ),
        ({"annotations": [{"id": 4, "image_id": None, "caption": "x"}]}, "'image_id' must be"),
        ({"annotations": [{"id": [], "image_id": 9, "caption": "x"}]}, "'id' must be integer or"),
    ],
)
def test_malformed_coco_entries_are_named(write, entries, expected):
    assert expected in refusal(write(changed(COCO, **entries)))


@pytest.mark.parametrize("file_name", [["a.jpg"], 7, {"a": 1}])
def test_a_coco_file_name_must_be_text(write, file_name):
    message = refusal(write(changed(COCO, images=[{"id": 9, "file_name": file_name}])))
    assert message == f"images[0] (id 9): 'file_name' must be text or null, found {file_name!r}"


def test_what_a_message_shows_of_an_entry_is_short(write):
    images = [{"id": 9, "file_name": ["x" * 100_000] * 100}]
    assert len(refusal(write(changed(COCO, images=images)))) < 300
    assert len(refusal(write(changed(COCO, images=["x" * 100_000])))) < 300


def test_coco_has_no_splits(write):
    assert "split 'train' was asked for" in refusal(write(COCO), "train")


# --- files that aren't JSON -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"images": [],\n "annotations": [{"id": 1', "not valid JSON at line 2, column"),
        ("", "not valid JSON at line 1, column 1"),
        ("[" * 100_000, "not usable JSON"),
        ('{"images": [{"id": ' + "1" * 5000 + "}]}", "not usable JSON"),
        (b'{"images": "\xff"}', "not UTF-8 text (byte 12); it looks like Latin-1"),
        ('{"images": []}'.encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("[1, 2]", "neither COCO captions"),
        ('{"a": 1, "b": 2}', "found a, b"),
        ("null", "found NoneType"),
    ],
)
def test_what_is_no_captions_file_says_where(write, content, expected):
    assert expected in refusal(write(content))


def test_missing_files_and_folders(tmp_path):
    assert refusal(tmp_path / "none.json") == "no such file"
    assert refusal(tmp_path / "none.csv") == "no such file"
    assert refusal(tmp_path) == "this is a folder, a file was expected"
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "none.json")


def test_byte_order_mark_and_windows_line_ends(write):
    text = json.dumps(COCO, indent=1).replace("\n", "\r\n")
    read = read_annotations(write(b"\xef\xbb\xbf" + text.encode()))
    assert rows(read) == rows(read_annotations(write(COCO, "plain.json")))
    csv = b"\xef\xbb\xbfimage,caption\r\na.jpg,A dog.\r\n\r\nb.jpg,A cat.\r\n"
    assert rows(read_annotations(write(csv, "c.csv"))) == [
        ("a.jpg", "a.jpg", ["A dog."]),
        ("b.jpg", "b.jpg", ["A cat."]),
    ]


# --- Karpathy -------------------------------------------------------------------------------


def test_karpathy(write):
    path = write(KARPATHY)
    a, b, c = (31, "val2014/a.jpg", ["An a."]), (1, "b.jpg", ["A b."]), ("c.jpg", "c.jpg", ["A c."])
    c = (*c[:2], ["A c.", "C."])
    assert rows(read_annotations(path)) == [a, b, c]
    assert rows(read_annotations(path, "train")) == [a]
    assert rows(read_annotations(path, "train+restval")) == [a, b]
    assert rows(read_annotations(path, "test")) == [c]


def test_an_unknown_split_is_refused_with_the_nearest_and_all(write):
    message = refusal(write(KARPATHY), "train+restva")
    assert "no image has split 'restva'; did you mean 'restval'?" in message
    assert "(there are restval, test, train)" in message


@pytest.mark.parametrize("name", ["restval", "test", "trainval"])
def test_a_split_that_is_missing_is_no_mistyped_other_one(write, name):
    content = changed(KARPATHY)
    for image, split in zip(content["images"], ["train", "val", "val"], strict=True):
        image["split"] = split
    expected = f"no image has split '{name}' (there are train, val)"
    assert refusal(write(content), f"train+{name}") == expected


def test_a_file_of_several_splits_read_whole_says_so(write):
    path = write(KARPATHY)
    note = f"{path}: no split was chosen, so the images of all splits are taken "
    assert read_annotations(path).notes == [note + "(train 1, restval 1, test 1)"]
    assert read_annotations(path, "train").notes == []
    listing = write("b.jpg", "list.txt")
    assert read_annotations(path, str(listing)).notes == []
    csv = write("image,split,caption\na.jpg,train,A\na.jpg,train,B\nb.jpg,val,C\n", "c.csv")
    assert read_annotations(csv).notes[0].endswith("all splits are taken (train 1, val 1)")
    one = write("image,split,caption\na.jpg,train,A\nb.jpg,train,C\n", "one.csv")
    assert read_annotations(one).notes == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"filename": None}, "images[1] (id None): 'filename' must be text, found None"),
        ({"split": 3}, "'split' must be text, found 3"),
        ({"filepath": 3}, "'filepath' must be text, found 3"),
        ({"cocoid": [1]}, "'cocoid' must be integer or text, found [1]"),
        ({"imgid": 0.5}, "'imgid' must be integer or text, found 0.5"),
        ({"sentences": None}, "'sentences' must be a list, found None"),
        ({"sentences": ["text"]}, "images[1] (id 1): a sentence lacks 'raw'"),
        ({"sentences": [{"tokens": ["a"]}]}, "images[1] (id 1): a sentence lacks 'raw'"),
        ({"cocoid": 31}, "1 image ids are listed twice (31)"),
    ],
)
def test_malformed_karpathy_entries_are_named(write, change, expected):
    content = changed(KARPATHY)
    content["images"][1].update(change)
    assert expected in refusal(write(content))


def test_karpathy_reports_empty_captions_by_sentence_id(write):
    content = changed(KARPATHY)
    content["images"][0]["sentences"][0]["raw"] = "  "
    del content["images"][1]["sentences"]
    notes = read_annotations(write(content)).notes
    assert "1 empty captions left out (ids 7)" in notes[0]
    assert "2 images have no caption (ids 31, 1)" in notes[1]


# --- CSV ------------------------------------------------------------------------------------


def test_csv_with_quotes_commas_and_line_breaks(write):
    text = (
        "image,caption\n"
        '1.jpg,"A dog, a cat, and a ""bird""."\n'
        "é 猫.jpg, Plain text. \n"
        '1.jpg,"Two\nlines."\n'
    )
    assert rows(read_annotations(write(text, "c.csv"))) == [
        ("1.jpg", "1.jpg", ['A dog, a cat, and a "bird".', "Two\nlines."]),
        ("é 猫.jpg", "é 猫.jpg", ["Plain text."]),
    ]


@pytest.mark.parametrize(
    "text",
    [
        # As Flickr30k's results.csv has it: spaces behind the bars, commas and quotes as they come.
        'image_name| comment_number| comment\n1.jpg| 0| "Stop" sign, red\n1.jpg| 1| 5" disc\n'
        '2.jpg| 0| An open " quote\n',
        'image_name\tcomment\n1.jpg\t"Stop" sign, red\n1.jpg\t5" disc\n2.jpg\tAn open " quote\n',
        'caption;File_Name\n"""Stop"" sign, red";1.jpg\n"5"" disc";1.jpg\nAn open " quote;2.jpg\n',
    ],
)
def test_other_delimiters(write, text):
    assert rows(read_annotations(write(text, "c.csv"))) == [
        ("1.jpg", "1.jpg", ['"Stop" sign, red', '5" disc']),
        ("2.jpg", "2.jpg", ['An open " quote']),
    ]


def test_tabs_with_proper_quotes(write):
    text = 'image\tcaption\n1.jpg\t"a ""b""\tc"\n'
    assert rows(read_annotations(write(text, "c.tsv"))) == [("1.jpg", "1.jpg", ['a "b"\tc'])]


def test_csv_with_a_split_column(write):
    text = "image,split,caption\na.jpg,train,A a.\nb.jpg, val ,A b.\na.jpg,train,Again a.\n"
    path = write(text, "c.csv")
    assert rows(read_annotations(path, "train")) == [("a.jpg", "a.jpg", ["A a.", "Again a."])]
    assert rows(read_annotations(path, "val")) == [("b.jpg", "b.jpg", ["A b."])]
    assert "no image has split 'vall'; did you mean 'val'?" in refusal(path, "vall")
    plain = write("image,caption\na.jpg,A a.\n", "plain.csv")
    assert "no 'split' column" in refusal(plain, "train")
    assert "split 'x" in refusal(plain, "x" * 5000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "line 1 must name the columns"),
        ("a.jpg,A dog.\n", "line 1 must name the columns"),
        ("image,caption\na.jpg,A dog\nb.jpg,A cat, black\n", "line 3: 2 columns were expected"),
        ("image,caption\n\na.jpg\n", "line 3: 2 columns were expected (image,caption), found 1"),
        ("image,caption\n,A dog\n", "line 2"),
        # A quote that isn't closed must not swallow the lines after it.
        ('image,caption\na.jpg,A\nb.jpg,"A dog\nc.jpg,A cat\n', "line 3: not valid CSV"),
        ('image,caption\na.jpg,"A dog\nb.jpg,"A cat"\nc.jpg,C\n', "line 2: not valid CSV"),
        ('image,caption\na.jpg,"Stop" sign\n', "line 2: not valid CSV"),
    ],
)
def test_malformed_csv_names_the_line(write, text, expected):
    message = refusal(write(text, "c.csv"))
    assert message.startswith(expected.split(":")[0])
    assert expected in message


def test_csv_reports_empty_captions(write):
    path = write('image,caption\na.jpg,A\na.jpg,\nb.jpg," "\n', "c.csv")
    assert read_annotations(path).notes == [
        f"{path}: 2 empty captions left out (ids a.jpg, b.jpg)",
        f"{path}: 1 images have no caption (ids b.jpg)",
    ]


def test_flickr_token_file(write):
    text = 'a.jpg#0\tA "dog, big.\r\na.jpg#1\tOne\u2028line\x85still.\r\n\r\nb#c.jpg#0\tA cat.\r\n'
    assert rows(read_annotations(write(text, "Flickr8k.token.txt"))) == [
        ("a.jpg", "a.jpg", ['A "dog, big.', "One\u2028line\x85still."]),
        ("b#c.jpg", "b#c.jpg", ["A cat."]),
    ]


def test_malformed_flickr_token_file_names_the_line(write):
    path = write("a.jpg#0\tA dog.\nb.jpg\tA cat.\n", "f.txt")
    assert "line 2: 'name.jpg#0<tab>caption' was expected" in refusal(path)


# --- a file that lists a split --------------------------------------------------------------


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_file_lists_the_split(write, line_end):
    listing = write(line_end.join(["nine.jpg", "", " two.jpg "]), "val.txt")
    assert [image.image_id for image in read_annotations(write(COCO), str(listing)).images] == [
        9,
        2,
    ]
    listing = write(f"two.jpg{line_end}", "val.txt")
    assert [image.image_id for image in read_annotations(write(COCO), str(listing)).images] == [2]
    csv = write("image,caption\ntwo.jpg,A\nnine.jpg,B\n", "c.csv")
    assert rows(read_annotations(csv, str(listing))) == [("two.jpg", "two.jpg", ["A"])]


def test_a_list_with_unknown_images_is_refused(write):
    path, listing = write(COCO), write("two.jpg\nno.jpg\nnone.jpg\n", "val.txt")
    with pytest.raises(DataError) as caught:
        read_annotations(path, str(listing))
    expected = f"{listing}: 2 listed images are not in {path} (no.jpg, none.jpg)"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("listed", "name", "kind"),
    [
        ("Two.JPG", "two.jpg", "upper and lower case"),
        ("two.png", "two.jpg", "suffix"),
        ("images/two.jpg", "two.jpg", "folder"),
        ("two.jpg", "val2014/two.jpg", "folder"),
        ("val2014\\two.jpg", "val2014/two.jpg", "slashes"),
        ("cafe\u0301.jpg", "caf\u00e9.jpg", "Unicode form"),
        ("000042.jpg", "42.jpg", "leading zeros"),
        ("COCO_val2014_42.jpg", "42.jpg", "COCO's prefix"),
        ("A/TWO.png", "two.jpg", "folder, upper and lower case, suffix"),
    ],
)
def test_a_listed_name_that_is_spelt_differently_is_explained(write, listed, name, kind):
    content = {"images": [{"id": 1, "file_name": name}, {"id": 2, "file_name": "x.jpg"}]}
    path, listing = write(content), write(f"{listed}\nother.jpg\n", "val.txt")
    with pytest.raises(DataError) as caught:
        read_annotations(path, str(listing))
    assert str(caught.value).endswith(
        f"; did you mean {name!r}, as in {path}, by {listed!r}? they differ only in {kind}"
    )


def test_a_name_that_may_mean_two_is_not_explained(write):
    path = write({"images": [{"id": n, "file_name": f"{n}/two.jpg"} for n in (1, 2)]})
    with pytest.raises(DataError, match=r"1 listed images are not in .*\(two.jpg\)$"):
        read_annotations(path, str(write("two.jpg", "val.txt")))


def test_captions_whose_ids_have_another_type_are_explained(write):
    annotations = [{"id": 1, "image_id": "9", "caption": "x"}]
    message = refusal(write(changed(COCO, annotations=annotations)))
    assert message.endswith(
        "(9); did you mean 9, as in 'images', by '9'? they differ only in type (a number on one "
        "side, text on the other)"
    )


@pytest.mark.parametrize("name", ["../a.jpg", "a/../../b.jpg", "/etc/passwd", ".."])
@pytest.mark.parametrize("folder", ["images", ".", "..", "/data"])
def test_names_that_reach_outside_the_folder_are_refused(folder, name):
    with pytest.raises(DataError, match="reaches outside the folder"):
        image_path(folder, name)


def test_names_in_the_folder_are_found():
    assert image_path("images", "val/a.jpg") == Path("images/val/a.jpg")
    assert image_path("..", "val/../..a.jpg") == Path("../..a.jpg")


# --- real files -----------------------------------------------------------------------------


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="needs ../shared/data/flickr8k")
def test_flickr8k_is_the_same_in_all_its_forms():
    coco = {}
    for split, count in (("train", 6000), ("val", 1000)):
        read = read_annotations(FLICKR8K / f"annotations/captions_{split}.json")
        karpathy = read_annotations(FLICKR8K / "dataset_flickr8k.json", split)
        by_name = {image.file_name: image.captions for image in read.images}
        assert len(by_name) == count
        assert {image.file_name: image.captions for image in karpathy.images} == by_name
        assert sum(map(len, by_name.values())) == 5 * count
        coco |= by_name
    csv = read_annotations(FLICKR8K / "captions.txt")
    assert {image.file_name: image.captions for image in csv.images} == coco
