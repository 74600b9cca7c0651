"""The feature cache: right, quick the second time, and whole whatever happens to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.data.image_files import load_image
from captioner.data.preprocessing import Preprocessing
from captioner.errors import CacheError, ImageError
from captioner.models.encoder import Encoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.training import feature_encoder
from captioner.training.feature_cache import cached_features, report_failures
from captioner.training.feature_store import FileStatus, default_cache_dir

CPU = torch.device("cpu")
SQUEEZENET = Preprocessing("squash", 48, 48)
COUNT = 70  # three batches of at most 32


def make_tiny_encoder(preprocessing=SQUEEZENET, seed=0):
    torch.manual_seed(seed)
    return Encoder("squeezenet1_1", preprocessing)


@pytest.fixture(scope="module")
def encoder():
    return make_tiny_encoder()


@pytest.fixture
def paths(tmp_path):
    return draw_images(tmp_path / "images", COUNT)


@pytest.fixture(scope="module")
def shared_paths(tmp_path_factory):
    """Images that no test changes."""
    return sorted(draw_images(tmp_path_factory.mktemp("shared") / "images", COUNT))


@pytest.fixture(scope="module")
def shared_features(encoder, shared_paths):
    """The features of these images, straight from the encoder."""
    return fresh(encoder, shared_paths)


@pytest.fixture(scope="module")
def full_cache(encoder, shared_paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "cache"
    get(encoder, shared_paths, folder)
    return folder


@pytest.fixture
def cache(full_cache, tmp_path):
    """A cache with the features of all shared images, to be damaged."""
    return shutil.copytree(full_cache, tmp_path / "cache")


def draw_images(folder, count):
    folder.mkdir()
    random = np.random.default_rng(0)
    paths = [folder / f"é {i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(path)
    return paths


def get(encoder, paths, cache, **options):
    return cached_features(encoder, paths, cache, CPU, torch.float32, workers=0, **options)


def fresh(encoder, paths):
    pixels = torch.stack([encoder.preprocessing(load_image(path)) for path in paths])
    return InferenceEncoder(encoder, torch.float32)(pixels)


def assert_close(found, expected):
    assert found.dtype == torch.float16
    assert expected.std() > 0
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def settled(monkeypatch):
    """Files are remembered although they were written just now."""
    monkeypatch.setattr(feature_encoder, "SETTLED_NS", -1)


def stores(cache):
    return sorted(path for path in Path(cache).iterdir() if path.is_dir())


def only_store(cache):
    (store,) = stores(cache)
    return store


def rows_on_disk(store):
    shape = json.loads((store / "meta.json").read_text())["row"]
    return (store / "features.f16").stat().st_size / (2 * shape[0] * shape[1])


def contents(store):
    return {
        name: (store / name).read_bytes() for name in ("features.f16", "index.jsonl", "meta.json")
    }


# --- what comes out -------------------------------------------------------------------------


def test_cached_features_are_those_of_the_encoder(
    encoder, shared_paths, shared_features, full_cache
):
    features = get(encoder, shared_paths, full_cache)
    assert features.rows.tolist() == list(range(COUNT))
    assert features.stored.shape == (COUNT, *encoder.grid_shape)
    assert_close(features.take(range(COUNT)), shared_features)
    assert_close(features.take([40, 3, 3]), shared_features[[40, 3, 3]])


def test_pooled_features_are_the_mean_of_the_grid(encoder, paths, tmp_path):
    pooled = get(encoder, paths[:5], tmp_path / "cache", pooled=True)
    assert pooled.stored.shape == (5, 1, encoder.grid_shape[1])
    assert_close(pooled.take(range(5)), fresh(encoder, paths[:5]).mean(1, keepdim=True))


def test_worker_processes_give_the_same(encoder, paths, tmp_path):
    one = get(encoder, paths, tmp_path / "one")
    two = cached_features(encoder, paths, tmp_path / "two", CPU, torch.float32, workers=2)
    assert torch.equal(one.take(range(COUNT)), two.take(range(COUNT)))


def test_features_beyond_float16_are_cut_to_its_range(paths, tmp_path):
    encoder = make_tiny_encoder()
    with torch.no_grad():
        encoder.cnn.features[12].expand1x1.weight.mul_(1e8)
    assert fresh(encoder, paths[:2]).max() > 65504
    found = get(encoder, paths[:2], tmp_path / "cache").take([0, 1])
    assert found.isfinite().all()
    assert found.max() == 65504


def test_no_images_at_all(encoder, tmp_path):
    features = get(encoder, [], tmp_path / "cache")
    assert features.stored.shape == (0, *encoder.grid_shape)
    assert len(features.rows) == 0


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "captioner" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "captioner" / "features"


# --- what is encoded, and what isn't --------------------------------------------------------


def test_the_second_time_nothing_is_encoded_read_or_written(
    encoder, paths, tmp_path, settled, monkeypatch
):
    first = get(encoder, paths, tmp_path / "cache")
    store = only_store(tmp_path / "cache")
    before = contents(store)
    old = time.time_ns() - 10**10
    for name in before:
        os.utime(store / name, ns=(old, old))
    monkeypatch.setattr(feature_encoder, "hash_file", lambda path: pytest.fail(f"{path} is read"))
    again = get(encoder, paths[::-1], tmp_path / "cache")
    assert again.rows.tolist() == first.rows.tolist()[::-1]
    assert contents(store) == before
    for name in ("features.f16", "index.jsonl"):
        assert (store / name).stat().st_mtime_ns == old
    assert (store / "meta.json").stat().st_mtime_ns > old  # when it was last used


def test_only_what_is_new_is_encoded(encoder, paths, tmp_path):
    get(encoder, paths[:10], tmp_path / "cache")
    store = only_store(tmp_path / "cache")
    assert rows_on_disk(store) == 10
    before = contents(store)
    features = get(encoder, paths[5:15], tmp_path / "cache")
    assert rows_on_disk(store) == 15
    assert contents(store)["features.f16"].startswith(before["features.f16"])
    assert_close(features.take(range(10)), fresh(encoder, paths[5:15]))


def test_an_image_that_comes_twice_is_encoded_once(encoder, paths, tmp_path):
    link = tmp_path / "link.png"
    link.symlink_to(paths[0])
    features = get(encoder, [paths[0], paths[1], paths[0], link], tmp_path / "cache")
    assert features.rows.tolist() == [0, 1, 0, 0]
    assert rows_on_disk(only_store(tmp_path / "cache")) == 2


@pytest.mark.parametrize("keep", ["size", "time", "size and time"])
def test_a_changed_image_is_encoded_anew(encoder, paths, tmp_path, settled, keep):
    paths = paths[:3]
    for i, path in enumerate(paths):
        Image.new("RGB", (16, 12), (60 * i, 0, 0)).save(path, "BMP")
    get(encoder, paths, tmp_path / "cache")
    before = paths[1].stat()
    Image.new("RGB", (16, 12), (10, 240, 20)).save(paths[1], "BMP" if "size" in keep else "PNG")
    assert (paths[1].stat().st_size == before.st_size) is ("size" in keep)
    if "time" in keep:
        os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    features = get(encoder, paths, tmp_path / "cache")
    assert features.rows.tolist() == [0, 3, 2]
    assert_close(features.take(range(3)), fresh(encoder, paths))


def test_a_file_written_just_now_is_hashed_again(encoder, paths, tmp_path):
    """Its time may stay the same if it is written again at once."""
    get(encoder, paths[:2], tmp_path / "cache")
    index = only_store(tmp_path / "cache") / "index.jsonl"
    assert [json.loads(line)[3] for line in index.read_text().splitlines()] == [None, None]


@pytest.mark.parametrize("move", [os.rename, shutil.copytree, lambda *ends: os.symlink(*ends)])
def test_a_data_set_that_has_moved_keeps_its_features(
    encoder, paths, tmp_path, settled, move, monkeypatch
):
    cache, moved = tmp_path / "cache", tmp_path / "elsewhere" / "images"
    moved.parent.mkdir()
    first = get(encoder, paths, cache)
    move(paths[0].parent, moved)
    monkeypatch.setattr(feature_encoder, "InferenceEncoder", lambda *_: pytest.fail("encoding"))
    paths = [moved / path.name for path in paths]
    assert get(encoder, paths, cache).rows.tolist() == first.rows.tolist()
    assert rows_on_disk(only_store(cache)) == COUNT
    # From then on it is known where it is.
    monkeypatch.setattr(feature_encoder, "hash_file", lambda path: pytest.fail(f"{path} is read"))
    assert get(encoder, paths, cache).rows.tolist() == first.rows.tolist()


def test_images_of_one_name_in_two_data_sets_are_never_mixed_up(encoder, tmp_path, settled):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, colour in zip(folders, ("red", "blue"), strict=True):
        folder.mkdir()
        Image.new("RGB", (16, 12), colour).save(folder / "1.bmp")
    paths = [folder / "1.bmp" for folder in folders]
    before = FileStatus.of(paths[0])
    get(encoder, paths, tmp_path / "cache")
    folders[0].rename(tmp_path / "c")
    folders[1].rename(folders[0])
    (tmp_path / "c").rename(folders[1])
    times = {"mtime_ns": 0, "ctime_ns": 0}  # they might be the same
    assert FileStatus.of(paths[0])._replace(**times) != before._replace(**times)
    features = get(encoder, paths, tmp_path / "cache")
    assert features.rows.tolist() == [1, 0]
    assert_close(features.take(range(2)), fresh(encoder, paths))


class ChangingPreprocessing(Preprocessing):
    """Changes each file right after reading it."""

    def open(self, path, *reserve, **options):
        loaded = super().open(path, *reserve, **options)
        Image.new("RGB", (16, 12)).save(path)
        return loaded


def test_an_image_that_changes_while_it_is_encoded_gets_no_features(paths, tmp_path):
    encoder = make_tiny_encoder(ChangingPreprocessing("squash", 48, 48))
    with pytest.raises(ImageError, match=r"0\.png: changed while it was read"):
        get(encoder, paths[:2], tmp_path / "cache")
    assert rows_on_disk(only_store(tmp_path / "cache")) == 0


def test_whatever_changes_the_features_has_a_store_of_its_own(encoder, paths, tmp_path):
    paths, cache = paths[:3], tmp_path / "cache"
    get(encoder, paths, cache)
    others = [
        make_tiny_encoder(seed=1),
        make_tiny_encoder(Preprocessing("squash", 64, 64)),
        make_tiny_encoder(Preprocessing("crop", 48, 48)),
        make_tiny_encoder(Preprocessing("squash", 48, 48, mean=(0.1, 0.2, 0.3))),
        make_tiny_encoder(Preprocessing("squash", 48, 48, "bicubic")),
        Encoder("resnet18", Preprocessing("squash", 48, 48)),
    ]
    for number, other in enumerate(others, 2):
        assert_close(get(other, paths, cache).take(range(3)), fresh(other, paths))
        assert len(stores(cache)) == number
    get(encoder, paths, cache, pooled=True)
    cached_features(encoder, paths, cache, CPU, torch.bfloat16, workers=0)
    assert len(stores(cache)) == 9
    assert_close(get(encoder, paths, cache).take(range(3)), fresh(encoder, paths))
    assert len(stores(cache)) == 9


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"squeezenet1_1"', '"resnet18"'),
        lambda text: text.replace('"format": 4', '"format": 3'),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "[" * 100_000,
    ],
)
def test_a_store_of_something_else_is_refused(encoder, paths, tmp_path, edit):
    get(encoder, paths[:2], tmp_path / "cache")
    store = only_store(tmp_path / "cache")
    text = (store / "meta.json").read_text()
    assert edit(text) != text
    (store / "meta.json").write_text(edit(text))
    before = contents(store)
    with pytest.raises(CacheError, match=r"describes other features|not .* JSON") as caught:
        get(encoder, paths, tmp_path / "cache")
    assert str(store) in str(caught.value)
    assert f"delete {store}" in str(caught.value)
    assert contents(store) == before
    shutil.rmtree(store)
    assert len(get(encoder, paths[:2], tmp_path / "cache").rows) == 2


# --- damage ---------------------------------------------------------------------------------


def test_an_image_whose_index_line_is_damaged_is_encoded_again(
    encoder, shared_paths, shared_features, cache, capsys
):
    index = only_store(cache) / "index.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join([*lines[:30], b"nonsense\n", *lines[31:]]))
    features = get(encoder, shared_paths, cache)
    assert features.rows.tolist() == [*range(30), COUNT, *range(31, COUNT)]
    assert_close(features.take(range(COUNT)), shared_features)
    assert capsys.readouterr().err.startswith(f"warning: {index}: 1 of {COUNT} lines are damaged")
    assert get(encoder, shared_paths, cache).rows.tolist() == features.rows.tolist()
    assert not capsys.readouterr().err


def flip(path, row, row_bytes):
    with open(path, "r+b") as file:
        file.seek(row * row_bytes + 1001)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 64]))


def test_an_image_whose_row_has_changed_is_encoded_again(
    encoder, shared_paths, shared_features, cache, capsys
):
    path = only_store(cache) / "features.f16"
    for row in (30, 31, 50):
        flip(path, row, path.stat().st_size // COUNT)
    features = get(encoder, shared_paths, cache).select(range(10, COUNT))
    assert_close(features.take(range(20)), shared_features[10:30])
    assert not capsys.readouterr().err  # rows are verified when they are used
    assert_close(features.take([19, 20, 20, 21]), shared_features[[29, 30, 30, 31]])
    warning = "2 rows have changed since they were written (30, 31); their images are encoded again"
    assert capsys.readouterr().err == f"warning: {path}: {warning}\n"
    assert_close(features.take(range(20, 30)), shared_features[30:40])
    again = get(encoder, shared_paths, cache)
    assert_close(again.take(range(50)), shared_features[:50])
    assert not capsys.readouterr().err  # mended on disk
    assert_close(again.take([50]), shared_features[[50]])
    assert "(50)" in capsys.readouterr().err
    assert rows_on_disk(path.parent) == COUNT


def test_a_changed_row_whose_image_is_gone_is_an_error(encoder, paths, tmp_path):
    features = get(encoder, paths[:2], tmp_path / "cache")
    path = only_store(tmp_path / "cache") / "features.f16"
    flip(path, 1, path.stat().st_size // 2)
    paths[1].unlink()
    with pytest.raises(ImageError, match=r"é 1.png: no such file; its features are damaged"):
        features.take([0, 1])


@pytest.fixture
def as_nobody():
    """What takes from this process the right to write, root's too, until the test ends."""
    modes = {}

    def drop(read_only, *readable):
        for path in [read_only, *read_only.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        for folder in {parent for path in (read_only, *readable) for parent in path.parents}:
            modes[folder] = folder.stat().st_mode
            if modes[folder] & 0o011 != 0o011:
                folder.chmod(modes[folder] | 0o011)
        if os.geteuid() == 0:
            os.seteuid(65534)

    yield drop
    if os.getuid() == 0:
        os.seteuid(0)
    for folder, mode in modes.items():
        if folder.stat().st_mode != mode:
            folder.chmod(mode)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs os.seteuid, which POSIX alone has")
def test_a_whole_cache_is_used_without_being_written(
    encoder, shared_paths, shared_features, cache, as_nobody, capsys
):
    path = only_store(cache) / "features.f16"
    flip(path, 3, path.stat().st_size // COUNT)
    before = contents(path.parent)
    as_nobody(cache, shared_paths[0])
    with pytest.raises(PermissionError):
        path.open("ab")
    features = get(encoder, shared_paths[:40], cache)
    for _ in range(2):
        assert_close(features.take(range(40)), shared_features[:40])
        errors = capsys.readouterr().err
    assert not errors  # the damaged row is encoded once
    with pytest.raises(CacheError, match=r"can't be written \(Permission denied\); .*cache_dir"):
        get(make_tiny_encoder(seed=1), shared_paths[:1], cache)
    assert contents(path.parent) == before


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import json, os, signal, torch
import test_feature_cache, captioner.training.feature_store as feature_store
torch.set_num_threads(1)
encoder = test_feature_cache.make_tiny_encoder()
index_fsyncs = []
fsync = feature_store._fsync

def kill_at_second_fsync(file):
    # Killed with its rows written and half of their index lines.
    if file.name.endswith("index.jsonl"):
        index_fsyncs.append(file)
        if len(index_fsyncs) == 2:
            file.flush()
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size - 250)
            os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)

print("ready", flush=True)
for line in sys.stdin:
    folder, cache, killed = json.loads(line)
    if killed:
        feature_store._fsync = kill_at_second_fsync
        feature_store.SECONDS_BETWEEN_SYNCS = 0.0
    paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
    features = test_feature_cache.get(encoder, paths, cache)
    print(features.rows.tolist(), flush=True)
"""


@pytest.fixture(scope="module")
def other_process():
    """A process that fills caches on order: importing takes long, so tests share it."""
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, **pipes)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    yield process
    process.kill()
    process.communicate()


def order(process, paths, cache, killed=False):
    process.stdin.write(json.dumps([str(paths[0].parent), str(cache), killed]) + "\n")
    process.stdin.flush()


def test_two_processes_at_once_encode_each_image_once(
    encoder, other_process, shared_paths, shared_features, tmp_path
):
    order(other_process, shared_paths, tmp_path / "cache")
    features = get(encoder, shared_paths, tmp_path / "cache")
    assert json.loads(other_process.stdout.readline()) == features.rows.tolist()
    assert rows_on_disk(only_store(tmp_path / "cache")) == COUNT
    assert_close(features.take(range(COUNT)), shared_features)


# The last test with the other process.
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX, for SIGKILL")
def test_a_killed_process_is_continued(
    encoder, other_process, shared_paths, shared_features, tmp_path
):
    order(other_process, shared_paths, tmp_path / "cache", killed=True)
    assert other_process.wait(timeout=60) == -signal.SIGKILL
    store = only_store(tmp_path / "cache")
    assert rows_on_disk(store) == 64
    assert 32 < len((store / "index.jsonl").read_bytes().splitlines()) < 64

    before = (store / "features.f16").read_bytes()
    features = get(encoder, shared_paths, tmp_path / "cache")  # its lock died with it
    assert rows_on_disk(store) == COUNT
    row = len(before) // 64
    assert (store / "features.f16").read_bytes()[: 32 * row] == before[: 32 * row]
    assert features.rows.tolist() == list(range(COUNT))
    assert_close(features.take(range(COUNT)), shared_features)


# --- disks and images that fail -------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_encoded(encoder, paths, tmp_path, monkeypatch):
    row = 2 * encoder.grid_shape[0] * encoder.grid_shape[1]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=COUNT * row - 1))
    with pytest.raises(CacheError, match=f"features of {COUNT} images take .* set data.cache_dir"):
        get(encoder, paths, tmp_path / "cache")
    assert rows_on_disk(only_store(tmp_path / "cache")) == 0
    get(encoder, paths[1:], tmp_path / "cache")  # one row less fits
    assert rows_on_disk(only_store(tmp_path / "cache")) == COUNT - 1


@pytest.fixture
def limit_file_size():
    """What lets files grow to so many bytes and no further, until the test ends."""
    resource = pytest.importorskip(
        "resource", reason="needs the module resource, which POSIX alone has"
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=before[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_what_was_whole(encoder, paths, tmp_path, limit_file_size):
    limit_file_size(40 * 2 * encoder.grid_shape[0] * encoder.grid_shape[1])
    with pytest.raises(CacheError) as caught:
        get(encoder, paths, tmp_path / "cache")
    limit_file_size()
    store = only_store(tmp_path / "cache")
    assert str(caught.value).startswith(f"{store}: can't be written (File too large)")
    assert len((store / "index.jsonl").read_bytes().splitlines()) == 32
    features = get(encoder, paths, tmp_path / "cache")
    assert rows_on_disk(store) == COUNT
    assert_close(features.take(range(COUNT)), fresh(encoder, paths))


def test_a_cache_folder_that_cannot_be_made_is_named(encoder, paths, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match=r"file/cache/\w+: can't be written .* data\.cache_dir"):
        get(encoder, paths, tmp_path / "file" / "cache")


@pytest.fixture
def spoilt(paths):
    """Image 1 is no image, image 2 is truncated, image 4 is gone."""
    paths = paths[:6]
    paths[1].write_bytes(b"no image")
    paths[2].write_bytes(paths[2].read_bytes()[:100])
    paths[4].unlink()
    return paths


def test_bad_images_are_an_error_after_the_others_have_been_kept(encoder, spoilt, tmp_path):
    with pytest.raises(ImageError, match="3 of 6 images can't be read") as caught:
        get(encoder, spoilt, tmp_path / "cache")
    for bad in (1, 2, 4):
        assert str(spoilt[bad]) in str(caught.value)
    assert "data.bad_images=skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert rows_on_disk(only_store(tmp_path / "cache")) == 3


def test_bad_images_may_be_skipped(encoder, spoilt, tmp_path, capsys):
    features = get(encoder, spoilt, tmp_path / "cache", bad_images="skip")
    assert features.rows.tolist() == [0, -1, -1, 1, -1, 2]
    assert "warning: 3 of 6 images can't be read" in capsys.readouterr().err
    good = [0, 3, 5]
    assert_close(features.take(good), fresh(encoder, [spoilt[i] for i in good]))
    with pytest.raises(IndexError, match="has no features"):
        features.take([0, 1])
    # A mended image gets its features.
    Image.new("RGB", (16, 12), "red").save(spoilt[1])
    mended = get(encoder, spoilt, tmp_path / "cache", bad_images="skip")
    assert mended.rows.tolist() == [0, 3, -1, 1, -1, 2]


def test_copies_of_a_bad_image_are_reported_too(encoder, spoilt, tmp_path, capsys):
    copy = shutil.copy(spoilt[1], tmp_path / "copy.png")
    features = get(encoder, [spoilt[0], spoilt[1], copy], tmp_path / "cache", bad_images="skip")
    assert features.rows.tolist() == [0, -1, -1]
    message = capsys.readouterr().err
    assert "2 of 3 images can't be read" in message
    assert f"{copy}: a copy of {spoilt[1]}" in message


def test_nothing_but_bad_images_is_an_error_even_when_skipping(encoder, spoilt, tmp_path):
    with pytest.raises(ImageError, match="2 of 2 images can't be read"):
        get(encoder, spoilt[1:3], tmp_path / "cache", bad_images="skip")


def test_failures_are_reported_in_the_order_of_the_images(capsys):
    report_failures([], 5, "error")
    report_failures([(3, "c"), (1, "a"), (9, "e"), (2, "b")], 10, "skip")
    said = capsys.readouterr().err
    assert "4 of 10 images can't be read: a, b, c and 1 more; they are left out" in said
