"""The feature cache's files: what is whole stays, whatever happens to them."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from captioner.errors import CacheError
from captioner.training.feature_store import (
    FeatureStore,
    FileStatus,
    list_stores,
    lock_path,
    remove_store,
)

FINGERPRINT = {
    "encoder": "resnet50",
    "last_stage": "",
    "weights_sha256": "0" * 64,
    "preprocessing": {"resize": "crop", "image_size": 224},
    "precision": "torch.bfloat16",
    "pooled": False,
}
SHAPE, COUNT = (2, 3), 8
ROW_BYTES = 12
CONTENTS = [f"{number:032x}" for number in range(COUNT)]
FILES = [FileStatus(f"/images/é{number}.jpg", number, 1, 2, 3) for number in range(COUNT)]
VALUES = np.random.default_rng(0).normal(size=(COUNT, *SHAPE)).astype(np.float16)


def fill(cache: Path, fingerprint: dict | None = None) -> FeatureStore:
    """Write the rows that the store lacks."""
    store = FeatureStore(cache, fingerprint or FINGERPRINT, SHAPE)
    with store.opened_for_append():
        new = [i for i in range(COUNT) if CONTENTS[i] not in store.row_by_content]
        store.append([CONTENTS[i] for i in new], VALUES[new], [FILES[i] for i in new])
    return store


def whole(store: FeatureStore) -> list[int]:
    """Return which images have the right features in a store, once all it has are verified."""
    rows = np.array(list(store.row_by_content.values()), dtype=np.int64)
    values, damaged = store.map_rows().read(rows)
    assert not damaged
    images = [CONTENTS.index(content) for content in store.row_by_content]
    np.testing.assert_array_equal(values, VALUES[images])
    assert all(store.content_by_file[FILES[i]] == CONTENTS[i] for i in images)
    return sorted(images)


def reopened(cache: Path) -> FeatureStore:
    return FeatureStore(cache, FINGERPRINT, SHAPE)


def files(store: FeatureStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "edit", "kept"),
    [
        ("features.f16", lambda content: content[:-1], COUNT - 1),
        ("features.f16", lambda content: content[: len(content) // 2 + 7], COUNT // 2),
        ("features.f16", lambda content: b"", 0),
        ("index.jsonl", lambda content: content[:-1], COUNT - 1),
        ("index.jsonl", lambda content: content[:-20], COUNT - 1),
        ("index.jsonl", lambda content: b"", 0),
        ("features.f16", lambda content: content + b"half a row", COUNT),
        ("index.jsonl", lambda content: content + b'["half a li', COUNT),
        ("index.jsonl", lambda content: content + b"\0" * 100, COUNT),
    ],
)
def test_what_is_whole_of_a_damaged_store_is_kept(tmp_path, name, edit, kept):
    store = fill(tmp_path)
    right = files(store)
    (store.folder / name).write_bytes(edit(right[name]))
    before = files(store)
    assert whole(reopened(tmp_path)) == list(range(kept))
    assert files(store) == before  # reading writes nothing
    fill(tmp_path)
    assert files(store) == right


@pytest.mark.parametrize(
    ("bad", "lost"),
    [
        *[(line, [3]) for line in (b"nonsense\n", b"3\n", b"null\n", b"{}\n", b"[]\n", b"\xff\n")],
        *[
            (json.dumps(line).encode() + b"\n", [3])
            for line in (
                [CONTENTS[3], -1, 0, None],
                [CONTENTS[3], 10**30, 0, None],
                [CONTENTS[3], True, 0, None],
                [CONTENTS[3], 3.0, 0, None],
                [CONTENTS[3], 3, 2**32, None],
                [CONTENTS[3], 3, -1, None],
                [[CONTENTS[3]], 3, 0, None],
                [{}, 3, 0, None],
                [CONTENTS[3], 3, 0, "/path"],
                [CONTENTS[3], 3, 0, ["/path", 1, 2, 3, None]],
                [CONTENTS[3], 3, 0, [["/path"], 1, 2, 3, 4]],
                ["/path/of/format/3.jpg", 1, 2, 3],
            )
        ],
        (b"[" * 200_000 + b"\n", [3]),
        (b'["x", ' + b"9" * 5_000 + b", 0, null]\n", [3]),
        (b"nonsense that runs into the next line", [3, 4]),
    ],
)
def test_an_odd_line_of_the_index_loses_its_own_row_alone(tmp_path, capsys, bad, lost):
    store = fill(tmp_path)
    lines = store.index_path.read_bytes().splitlines(keepends=True)
    store.index_path.write_bytes(b"".join([*lines[:3], bad, *lines[4:]]))
    assert whole(reopened(tmp_path)) == [i for i in range(COUNT) if i not in lost]
    assert not capsys.readouterr().err
    assert whole(fill(tmp_path)) == list(range(COUNT))
    warning = f"warning: {store.index_path}: 1 of {COUNT - len(lost) + 1} lines are damaged"
    assert capsys.readouterr().err.startswith(warning)
    fill(tmp_path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["meta.json", "index.jsonl", "features.f16", "lock"])
def test_what_is_no_file_is_named(tmp_path, name, make):
    store = fill(tmp_path)
    path = lock_path(store.folder) if name == "lock" else store.folder / name
    path.unlink()
    make(path)
    with pytest.raises(CacheError, match="a file was expected, not a folder, pipe or device") as e:
        reopened(tmp_path)
    assert str(path) in str(e.value)


# --- checksums --------------------------------------------------------------------------------


def overwrite(store: FeatureStore, row: int, content: bytes) -> None:
    with store.features_path.open("r+b") as file:
        file.seek(row * ROW_BYTES)
        file.write(content)


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * ROW_BYTES,
        VALUES[3].tobytes(),
        VALUES[2, ::-1].tobytes(),
        VALUES[2].tobytes()[:-1] + bytes([VALUES[2].tobytes()[-1] ^ 1]),
    ],
    ids=["zeros", "another row", "another order", "one bit"],
)
def test_an_overwritten_row_is_noticed_when_it_is_read(tmp_path, content):
    store = fill(tmp_path)
    stored = reopened(tmp_path).map_rows()
    overwrite(store, 2, content)
    assert stored.read(np.array([0, 1, 3, 3]))[1] == []
    assert stored.read(np.array([1, 2, 4, 2]))[1] == [1, 3]
    with store.opened_for_append():
        store.rewrite(2, CONTENTS[2], VALUES[2])
    assert stored.read(np.array([2]))[1] == []
    assert whole(reopened(tmp_path)) == list(range(COUNT))


def test_a_checksum_that_has_changed_counts_as_damage(tmp_path):
    store = fill(tmp_path)
    lines = [json.loads(line) for line in store.index_path.read_text().splitlines()]
    lines[2][2] ^= 1
    lines[5][1] = 4  # the row of another image
    store.index_path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    again = reopened(tmp_path)
    rows = [again.row_by_content[content] for content in CONTENTS]
    assert set(again.map_rows().read(np.array(rows))[1]) >= {2, 5}


# --- listing and removing ---------------------------------------------------------------------


def make_old_store(cache: Path) -> Path:
    folder = cache / "0123456789abcdef"
    folder.mkdir(parents=True)
    meta = {"format": 3, "row": [49, 2048], "dtype": "float16", **FINGERPRINT}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "features.f16").write_bytes(b"\0" * 49 * 2048 * 2 * 3)
    (folder / "lock").touch()
    return folder


def test_stores_are_listed(tmp_path):
    assert list_stores(tmp_path / "none") == []
    cache = tmp_path / "cache"
    old = make_old_store(cache)
    store = fill(cache)
    damaged = fill(cache, {**FINGERPRINT, "pooled": True})
    damaged.meta_path.write_text('{"row": "x"}')
    (cache / "photographs").mkdir()
    (cache / "notes.txt").touch()
    stores = {info.folder: info for info in list_stores(cache)}
    assert stores.keys() == {old, store.folder, damaged.folder}
    info = stores[store.folder]
    assert (info.encoder, info.images, info.in_use) == ("resnet50", COUNT, True)
    assert info.details == "crop 224, 2 regions of 3, bfloat16"
    assert info.size == sum(map(len, files(store).values()))
    assert abs(info.last_used - time.time()) < 60
    assert (stores[old].images, stores[old].in_use) == (3, False)
    assert (stores[damaged.folder].encoder, stores[damaged.folder].in_use) == ("", False)


def test_a_large_store_tells_of_old_ones(tmp_path, capsys):
    store, old = fill(tmp_path), make_old_store(tmp_path)
    os.truncate(old / "features.f16", 2 * 10**9)  # sparse
    store.check_free_space(2 * 10**9 // ROW_BYTES)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("grows by 2.0 GB")
    assert lines[1] == "'captioner cache prune --old' frees 2.0 GB of old ones"


def test_a_store_that_is_being_filled_is_not_removed(tmp_path):
    store, old = fill(tmp_path), make_old_store(tmp_path)
    for folder, lock in ((store.folder, lock_path(store.folder)), (old, old / "lock")):
        with FileLock(lock), pytest.raises(CacheError, match="is filling it; not removed"):
            remove_store(folder)
        assert len(list(folder.iterdir())) == 3
        remove_store(folder)
        assert not folder.exists()


def test_rows_in_use_outlive_their_store(tmp_path):
    store = fill(tmp_path)
    stored = store.map_rows()
    remove_store(store.folder)
    np.testing.assert_array_equal(stored.read(np.arange(COUNT))[0], VALUES)
    with store.opened_for_append(), pytest.raises(CacheError, match="removed or filled anew"):
        store.rewrite(0, CONTENTS[0], VALUES[0])


def test_a_process_that_waited_for_the_removal_fills_a_new_store(tmp_path, capsys):
    store = fill(tmp_path)
    with FileLock(lock_path(store.folder)):
        thread = threading.Thread(target=fill, args=[tmp_path])
        thread.start()
        while "waiting for it" not in capsys.readouterr().err:
            time.sleep(0.01)
        shutil.rmtree(store.folder)
    thread.join()
    assert whole(reopened(tmp_path)) == list(range(COUNT))
