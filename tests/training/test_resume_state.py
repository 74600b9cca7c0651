"""training_state.pt, read for resuming: whole, or refused in one line."""

import os
from pathlib import Path

import pytest
import torch

from captioner.config import Config
from captioner.errors import CheckpointError, ConfigError
from captioner.experiment_file import parse
from captioner.files import atomic_directory
from captioner.models.checkpoint import load_checkpoint, save_checkpoint
from captioner.training.resume import (
    STATE_FILE,
    Circumstances,
    TrainState,
    load_training_state,
    pack_state,
    randomness_of,
    unpack_state,
)

CPU = torch.device("cpu")
DATA = {f"{split}_{name}": "x" for split in ("train", "val") for name in ("annotations", "images")}
CONFIG = parse(Config, {"data": DATA}, "test")


def make_optimizer(width: int = 3) -> torch.optim.Optimizer:
    layer = torch.nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def run(tiny_model, tmp_path) -> Path:
    """A run's folder with ``last``, as a trainer writes it."""
    circumstances = Circumstances("0" * 64, "1" * 64, "float32", "cpu")
    state = TrainState(epoch=2, step=9, best_scores={"BLEU-4": 0.5}, wandb_id="abc", loss=1 / 3)
    with atomic_directory(tmp_path / "run/last") as aside:
        packed = pack_state(
            state, circumstances, CONFIG, make_optimizer(), None, [randomness_of(CPU)]
        )
        torch.save(packed, aside / STATE_FILE)
        save_checkpoint(tiny_model, aside, {})
    return tmp_path / "run"


@pytest.fixture
def unchecked(run: Path) -> Path:
    (run / "last/SHA256SUMS").unlink()
    return run


def refusal(run: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_training_state(run, CONFIG, resume=True)
    message = str(caught.value)
    assert "\n" not in message
    path = str(run / "last" / STATE_FILE)
    assert message.startswith(f"{path}: ")
    assert "weights_only" not in message  # torch's advice is to run the code after all
    return message.removeprefix(f"{path}: ")


def test_what_was_saved_comes_back(run):
    state = load_training_state(run, CONFIG, resume=True)
    optimizer = make_optimizer()
    assert unpack_state(state, CONFIG, optimizer, None, CPU) == TrainState(
        epoch=2, step=9, best_scores={"BLEU-4": 0.5}, wandb_id="abc", loss=1 / 3
    )
    assert Circumstances(**state["circumstances"]).precision == "float32"
    with pytest.raises(ConfigError, match="a run is there already"):
        load_training_state(run, CONFIG, resume=False)


def test_a_state_without_checksums_is_read(unchecked):
    assert load_training_state(unchecked, CONFIG, resume=True)["format"] == 2


@pytest.mark.parametrize("place", [100, -1000, -30])
def test_one_flipped_byte_is_seen(run, place):
    path = run / "last" / STATE_FILE
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert refusal(run).startswith("not what was saved")
    load_checkpoint(run / "last")  # the captioner itself is whole


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"{}", b"PK\x03\x04aaaa"], ids=len)
def test_a_state_that_a_crash_left(run, unchecked, content):
    """Empty above all: what file systems leave of a file whose bytes never reached the disk."""
    (run / "last" / STATE_FILE).write_bytes(content)
    message = refusal(run)
    assert message.startswith("not a training state that can be resumed (")
    assert "start a new one in another --output-dir" in message


def test_a_state_that_is_cut_short(unchecked):
    path = unchecked / "last" / STATE_FILE
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        refusal(unchecked)


def without(*names):
    return lambda state: {name: value for name, value in state.items() if name not in names}


def changed(**values):
    return lambda state: state | values


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda _: [1, 2], "a dict was expected, found list"),
        (lambda _: None, "a dict was expected, found NoneType"),
        (lambda _: {}, "written by another version of captioner (format 1"),
        (without("config"), "'config': str was expected, found nothing"),
        (without("train_state"), "'train_state': dict was expected, found nothing"),
        (without("circumstances"), "'circumstances': dict was expected, found nothing"),
        (without("optimizer"), "'optimizer': dict was expected, found nothing"),
        (without("rng"), "'rng': Tensor was expected, found nothing"),
        (without("rng_cuda"), "'rng_cuda': list was expected, found nothing"),
        (changed(config=5), "'config': str was expected, found int"),
        (changed(config="{"), "not valid JSON"),
        (changed(config="[" * 100_000), "not usable JSON"),
        (changed(train_state={"epoch": "two"}), "train_state: epoch: input should be a valid int"),
        (changed(train_state={"epochs": 2}), "train_state: unknown key 'epochs'"),
        (changed(circumstances={}), "circumstances: train_sha256: field required"),
        (changed(rng=torch.zeros(3)), "'rng': not the state of a random generator"),
        (changed(rng_others=[5]), "'rng': not the state of a random generator"),
        (changed(format=torch.zeros(3)), "format"),
    ],
)
def test_a_state_that_holds_something_else(unchecked, change, expected):
    path = unchecked / "last" / STATE_FILE
    torch.save(change(torch.load(path, weights_only=True)), path)
    assert expected in refusal(unchecked)


def test_the_optimiser_of_another_model(run):
    state = load_training_state(run, CONFIG, resume=True)
    layer = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(
        CheckpointError, match=r"training_state\.pt: its optimiser or average isn't that of"
    ):
        unpack_state(state, CONFIG, torch.optim.AdamW(layer.parameters()), None, CPU)
    for name in ("state", "param_groups"):
        broken = state | {"optimizer": {name: 5}}
        with pytest.raises(
            CheckpointError, match=r"training_state\.pt: its optimiser or average isn't that"
        ):
            unpack_state(broken, CONFIG, make_optimizer(), None, CPU)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(run, kind):
    path = run / "last" / STATE_FILE
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    refusal(run)


def test_a_run_that_was_killed_between_renames_goes_on(run):
    last = run / "last"
    last.rename(run / ".last.previous")
    (run / ".best.0123456789abcdef.tmp").mkdir()
    assert load_training_state(run, CONFIG, resume=True)
    assert os.listdir(run) == ["last"]
