"""Which images are meant by folders, patterns, lists and shards."""

import io
import os
import sys
from collections import Counter as Counts
from pathlib import Path

import pytest

from captioner.data import listing
from captioner.data.listing import Counter, Listing, Selection, Shard, iterate_images, read_list
from captioner.errors import DataError, UsageError

NAMES = ["b.jpg", "a.JPG", "z/1.png", "z/2.gif", "2024/x.jpg", "2024/july/y.jpg", "c.webp"]


@pytest.fixture
def folder(tmp_path):
    for name in (*NAMES, "notes.txt", ".hidden.jpg", ".git/x.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    return tmp_path / "photos"


def names(folder: Path, **selection) -> list[str]:
    return [image.name for image in iterate_images([folder], Selection(**selection))]


def test_the_files_of_a_folder_come_before_those_of_its_folders(folder):
    expected = ["a.JPG", "b.jpg", "c.webp", "2024/x.jpg", "2024/july/y.jpg", "z/1.png", "z/2.gif"]
    assert names(folder) == expected
    assert names(folder, recursive=False) == expected[:3]


def test_patterns_fit_names_and_paths(folder):
    assert names(folder, include=("*.jpg",)) == ["b.jpg", "2024/x.jpg", "2024/july/y.jpg"]
    assert names(folder, include=("2024/*", "?.webp")) == [
        *("c.webp", "2024/x.jpg", "2024/july/y.jpg")
    ]
    assert names(folder, exclude=("z", "july", "a.*")) == ["b.jpg", "c.webp", "2024/x.jpg"]
    assert names(folder, include=("*.jpg",), exclude=("2024/july",)) == ["b.jpg", "2024/x.jpg"]


def test_links_to_folders_are_followed_when_asked_and_never_in_circles(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.jpg").write_bytes(b"")
    (folder / "z" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "z" / "back").symlink_to(folder)
    (folder / "z" / "itself").symlink_to("itself")
    (folder / "file.jpg").symlink_to(folder / "b.jpg")
    plain = names(folder)
    assert "file.jpg" in plain
    assert not any("linked" in name or "back" in name for name in plain)
    assert set(names(folder, follow_links=True)) - set(plain) == {"z/linked/far.jpg"}


def test_many_names_are_sorted_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "NAMES_AT_ONCE", 3)
    texts = [f"{7 * number % 11:02}\n{number}.jpg" for number in range(11)]
    texts += [os.fsdecode(b"caf\xe9.jpg"), "猫.jpg"]
    for text in texts:
        (tmp_path / text).write_bytes(b"")
    assert names(tmp_path) == sorted(texts)


def test_what_is_named_twice_comes_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    paths = [Path("b.jpg"), Path("2024"), Path("b.jpg"), Path("2024/july"), Path(".")]
    found = [image.name for image in iterate_images(paths)]
    assert found[:3] == ["b.jpg", "2024/x.jpg", "2024/july/y.jpg"]
    assert Counts(found) == Counts(NAMES)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\0"])
def test_lists_of_paths(tmp_path, monkeypatch, ending):
    paths = ["a b.jpg", "/x/é.png", "-rf", os.fsdecode(b"caf\xe9.jpg"), "'\"<>"]
    paths += ["two\nlines.jpg"] if ending == "\0" else []
    content = b"".join(os.fsencode(path + ending) for path in [*paths, ""])
    (tmp_path / "list").write_bytes(content)
    zero = b"\0" if ending == "\0" else b"\n"
    assert [image.image_id for image in read_list(str(tmp_path / "list"), zero)] == paths
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = Listing.of_list("-", ending == "\0")
    assert [str(image.path) for image in found.images()] == paths
    with pytest.raises(UsageError, match="no such file"):
        Listing.of_list(str(tmp_path / "none"))


def test_shards_part_any_listing(folder):
    parts = [
        [image.name for image in Listing.of_inputs([folder], shard=Shard(i, 3)).images()]
        for i in (1, 2, 3)
    ]
    assert Counts(name for part in parts for name in part) == Counts(NAMES)
    # By the name alone, for ever.
    assert [Shard.parse("2/3").__contains__(f"{n}.jpg") for n in range(8)].count(True) == 3
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2", "1/3/2"):
        with pytest.raises(ValueError, match=r"."):
            Shard.parse(text)


def test_counting_goes_on_beside(folder, tmp_path):
    counts: list[int] = []
    with Counter(Listing.of_inputs([folder]), counts.append) as counter:
        counter.begin()
        counter.begin()
        counter.join()
    assert counts == [len(NAMES)]
    with Counter(Listing.of_list("-"), counts.append) as counter:
        counter.begin()
        assert not counter.is_alive()
    with pytest.raises(DataError, match="no such file or folder"):
        Listing.of_inputs([tmp_path / "gone"])
