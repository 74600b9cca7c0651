"""``captioner cache list|prune``."""

import os
import time

import pytest

from captioner.commands import main
from captioner.training.feature_store import FeatureStore

FINGERPRINT = {
    "last_stage": "",
    "preprocessing": {"resize": "crop", "image_size": 224},
    "precision": "torch.float32",
    "pooled": True,
}
DAY = 86_400


@pytest.fixture
def stores(tmp_path):
    """Stores of two CNNs, the first last used 100 days ago, by the name of their CNN."""
    stores = {}
    for name in ("resnet50", "mobilenet_v2"):
        store = FeatureStore(tmp_path / "cache", {"encoder": name, **FINGERPRINT}, (1, 4))
        with store.opened_for_append():
            pass
        stores[name] = store.folder
    then = time.time() - 100 * DAY
    os.utime(stores["resnet50"] / "meta.json", (then, then))
    return stores


def run(tmp_path, action, *options):
    return main(["cache", action, "--cache-dir", str(tmp_path / "cache"), *map(str, options)])


def test_the_list_names_each_store(stores, tmp_path, capsys):
    assert run(tmp_path, "list") == 0
    output = capsys.readouterr().out
    assert output.startswith("2 stores, 0.00 GB, in ")
    for name, folder in stores.items():
        assert f"{name} (crop 224, pooled of 4, float32)" in output
        assert folder.name in output
    assert time.strftime("%Y-%m-%d", time.localtime(time.time() - 100 * DAY)) in output


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--unused-for", 90], ["mobilenet_v2"]),
        (["--unused-for", 101], ["mobilenet_v2", "resnet50"]),
        (["mobilenet_v2"], ["resnet50"]),
        (["mobilenet_v2", "--unused-for", 90], ["mobilenet_v2", "resnet50"]),
        (["--old"], ["mobilenet_v2", "resnet50"]),
        (["--all"], []),
    ],
)
def test_only_what_meets_all_conditions_is_removed(stores, tmp_path, capsys, options, left):
    assert run(tmp_path, "prune", *options) == 0
    assert all(folder.exists() for folder in stores.values())
    assert "nothing is removed yet: with --yes" in capsys.readouterr().out
    assert run(tmp_path, "prune", *options, "--yes") == 0
    assert sorted(name for name, folder in stores.items() if folder.exists()) == left
    removed = 2 - len(left)
    assert f"removed {removed} of {removed}: 0.00 GB freed" in capsys.readouterr().out


def test_a_store_is_removed_by_its_folder(stores, tmp_path):
    assert run(tmp_path, "prune", stores["resnet50"].name, "--yes") == 0
    assert [name for name, folder in stores.items() if folder.exists()] == ["mobilenet_v2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name stores, or give --unused-for, --old or --all"),
        (["resnet5", "--yes"], "no store 'resnet5'; did you mean 'resnet50'?"),
        (["../cache", "--yes"], "no store '../cache'"),
        (["--unused-for", "x"], "invalid"),
        (["--unused-for", "-1"], "invalid"),
    ],
)
def test_wrong_command_lines_remove_nothing(stores, tmp_path, capsys, options, message):
    try:
        code = run(tmp_path, "prune", *options)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert all(folder.exists() for folder in stores.values())


def test_what_cannot_be_removed_is_named(stores, tmp_path, capsys):
    elsewhere = stores["resnet50"].rename(tmp_path / "elsewhere")
    stores["resnet50"].symlink_to(elsewhere)
    assert run(tmp_path, "prune", "--all", "--yes") == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {stores['resnet50']}: can't be removed")
    assert "removed 1 of 2" in output.out
    assert (elsewhere / "meta.json").exists()
    assert not stores["mobilenet_v2"].exists()
