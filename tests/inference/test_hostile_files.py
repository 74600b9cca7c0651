"""A folder of more than a hundred files of all kinds: each is captioned, or named with a reason."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import ANY, make_hostile_folder
from PIL import features

from captioner.data.image_files import load_image
from captioner.errors import ImageError

MEMORY_MB = 500  # above what the same takes for one small image


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    if os.name != "posix":
        pytest.skip("pipes and links are POSIX's")
    pytest.importorskip("pillow_heif").register_heif_opener()
    if not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    folder = tmp_path_factory.mktemp("hostile") / "files"
    folder.mkdir()
    return folder, *make_hostile_folder(folder)


def run(checkpoint: Path, inputs: Path, output: Path) -> tuple[int, int]:
    """Caption a folder in a process of its own; return its exit code and its peak in MB."""
    code = (
        "import resource, sys; from captioner.commands.caption import main; code = main(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10); sys.exit(code)"
    )
    words = [sys.executable, "-c", code, checkpoint, inputs, "--output", output, "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, int(done.stdout.split()[-1])


def test_each_is_captioned_or_named_with_its_reason(checkpoint, hostile, drawn, tmp_path):
    folder, captions, reasons = hostile
    assert len(captions) + len(reasons) >= 60
    (tmp_path / "one").mkdir()
    shutil.copy(drawn.paths[0], tmp_path / "one")
    _, usual = run(checkpoint, tmp_path / "one", tmp_path / "one.jsonl")
    code, peak = run(checkpoint, folder, tmp_path / "c.jsonl")
    assert code == 3
    assert peak < usual + MEMORY_MB
    found = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    failed = (tmp_path / "c.jsonl.failures.jsonl").read_text().splitlines()
    failures = {row["file_name"]: row["error"] for row in map(json.loads, failed)}
    assert {row["file_name"] for row in found} == captions.keys()
    assert failures.keys() == reasons.keys()
    wrong = {
        row["file_name"]: row["caption"]
        for row in found
        if captions[row["file_name"]] not in (ANY, row["caption"])
    }
    assert not wrong
    for name, reason in reasons.items():
        assert failures[name].startswith(f"{folder / name}: ")
        assert reason in failures[name], name
        assert "\n" not in failures[name].removeprefix(str(folder / name))


def test_heic_without_its_package_is_named(hostile, tmp_path):
    folder = hostile[0]
    code = (
        "import sys; sys.modules['pillow_heif'] = None; "
        "from captioner.data.image_files import load_image; load_image(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "a.heic"], capture_output=True, text=True
    )
    assert "(for HEIC: pip install 'captioner[heic]')" in done.stderr
    with pytest.raises(ImageError, match="too many"):
        load_image(folder / "bomb.png")
