import pytest
from PIL import Image

from captioner.data.predictions import write_predictions
from captioner.errors import DataError
from tools.contact_sheet import choose, main


@pytest.fixture
def sheet(drawn, tmp_path):
    """Draw a sheet of the drawn images, or of other captions; return its exit code and file."""

    def draw(*options, captions=None):
        captions = captions or drawn.captions
        rows = [{"image_id": name, "caption": text} for name, text in captions.items()]
        write_predictions(tmp_path / "captions.json", rows)
        output = tmp_path / "sheet.png"
        words = [tmp_path / "captions.json", drawn.images, "--output", output, *options]
        return main([str(word) for word in words]), output

    return draw


def test_images_and_captions_in_rows(sheet):
    code, output = sheet("--count", 6, "--columns", 3, "--size", 80)
    assert code == 0
    with Image.open(output) as image:
        assert image.width == 3 * 88 + 8
        assert image.getpixel((8 + 40, 8 + 40)) == (255, 0, 0)
        assert image.getpixel((8 + 2 * 88 + 40, 8 + 32)) == (0, 255, 0)
        assert 2 * (80 + 16) < image.height < 2 * (80 + 16 * 6)


def test_images_of_annotations_are_found_by_id(sheet, drawn):
    options = ("--annotations", drawn.annotations, "--columns", 9)
    code, output = sheet(*options, captions={0: "a disc", 7: "a square"})
    assert code == 0
    with Image.open(output) as image:
        assert image.width == 2 * 188 + 8


def test_a_very_long_caption_is_cut(sheet, drawn):
    name = next(iter(drawn.captions))
    code, output = sheet(captions={name: "word " * 20_000})
    assert code == 0
    with Image.open(output) as image:
        assert image.height < 500


def test_captions_of_several_files_are_numbered(tmp_path):
    for name, word in {"a": "dog", "b": "cat"}.items():
        rows = [{"image_id": n, "caption": f"a {word} {n}"} for n in range(20)]
        write_predictions(tmp_path / f"{name}.json", rows)
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    assert choose([one], 2, None) == {0: "a dog 0", 1: "a dog 1"}
    assert choose([one, other], 1, None) == {0: "1: a dog 0\n2: a cat 0"}
    drawn = choose([one], 5, 3)
    assert len(drawn) == 5
    assert list(drawn) == list(choose([one, other], 5, 3)) != list(choose([one], 5, 4))
    write_predictions(other, [{"image_id": 1, "caption": "a cat"}])
    with pytest.raises(DataError, match=r"b\.json: no caption of 0, which .*a\.json has"):
        choose([one, other], 2, None)


@pytest.mark.parametrize(
    ("options", "captions", "code", "message"),
    [
        (["--columns", 0], None, 2, "--columns must be at least 1, found 0"),
        (["--count", -1], None, 2, "--count must be at least 1, found -1"),
        (["--size", 0], None, 2, "--size must be at least 1, found 0"),
        ([], {"../a.png": "a"}, 1, "'../a.png' reaches outside the folder"),
        ([], {"none.png": "a"}, 1, "none.png: no such file"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sheet, capsys, options, captions, code, message):
    assert sheet(*options, captions=captions)[0] == code
    assert message in capsys.readouterr().err
