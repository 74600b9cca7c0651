"""What keeps a GPU busy, and what that must not change; on a CPU too, where it shows there."""

from functools import partial

import pytest
import torch
from devices import CUDA
from training_runs import assert_same_weights, read_log

from captioner.device import arithmetic
from captioner.errors import TrainingError
from captioner.experiment_file import load_config
from captioner.models.captioning_model import DECODERS
from captioner.models.compiled_steps import CompiledSteps
from captioner.training import objectives
from captioner.training.inputs import CachedInputs
from captioner.training.run import train
from captioner.training.trainer import Trainer

TIMED = ("seconds", "per_second")


def read_numbers_every(steps, monkeypatch):
    """Have the numbers on the device be read every so many steps, whatever the device."""
    initialise = Trainer.__init__

    def patched(trainer, *args):
        initialise(trainer, *args)
        trainer.read_every = steps

    monkeypatch.setattr(Trainer, "__init__", patched)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_numbers_that_are_read_now_and_then_are_the_same(experiment, tmp_path, device, monkeypatch):
    """5 doesn't divide the 6 steps of an epoch, whose sum is complete all the same."""
    settings = [f"training.device={device}", "training.log_every=5", "training.deterministic=true"]
    settings += ["training.objective=self_critical", "self_critical.cross_entropy_share=0.5"]
    config = load_config(experiment, settings)
    runs = []
    for steps in (5, 1):
        with monkeypatch.context() as patch:
            read_numbers_every(steps, patch)
            train(config, tmp_path / str(steps))
        rows = read_log(tmp_path / str(steps))
        runs.append([{k: v for k, v in row.items() if not k.endswith(TIMED)} for row in rows])
    assert_same_weights(tmp_path / "5/last", tmp_path / "1/last")
    assert runs[0] == runs[1]
    assert [row["step"] for row in runs[0] if row["kind"] == "step"] == [5, 10, 15]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_no_checkpoint_holds_what_came_of_nan(experiment, tmp_path, device, monkeypatch):
    """The loss of step 3 is NaN, the next log line is far, and a checkpoint comes before it."""
    read_numbers_every(100, monkeypatch)
    calls = []
    loss = objectives.caption_loss

    def poisoned(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(objectives, "caption_loss", poisoned)
    settings = [f"training.device={device}", "training.log_every=100"]
    config = load_config(experiment, [*settings, "training.checkpoint_every=2"])
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan .* checkpoint is .*last"):
        train(config, tmp_path / "run")
    assert len(calls) == 4
    state = torch.load(tmp_path / "run/last/training_state.pt", weights_only=True)
    assert state["train_state"]["step"] == 2


def test_arithmetic_is_as_before_afterwards():
    def state():
        return (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
        )

    before = state()
    with arithmetic(torch.device("cuda"), torch.bfloat16, True):
        assert state() == ("high", True, False)
    assert state() == before
    with arithmetic(torch.device("cuda"), torch.float32, False):
        assert state() == before
    with arithmetic(torch.device("cpu"), torch.bfloat16, True):
        assert state() == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("objective", ["cross_entropy", "self_critical"])
def test_a_run_with_compiled_steps_is_the_same_to_rounding(
    experiment, tmp_path, device, objective, monkeypatch
):
    """On a CPU without the C++ compiler, which takes long: other tests have it."""
    if device == "cpu":
        fast = partial(CompiledSteps, backend="aot_eager")
        monkeypatch.setattr(objectives, "CompiledSteps", fast)
    settings = [f"training.device={device}", f"training.objective={objective}"]
    settings += ["decoder.dropout=0", "self_critical.cross_entropy_share=0.5"]
    settings += ["training.epochs=1", "training.scheduled_sampling=0"]
    losses = []
    for value in ("true", "false"):
        config = load_config(experiment, [*settings, f"training.compile={value}"])
        train(config, tmp_path / value)
        losses.append([row["loss"] for row in read_log(tmp_path / value) if row["kind"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- on a GPU alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("device", [CUDA])
def test_a_step_waits_for_nothing(experiment, tmp_path, device, kind, monkeypatch):
    optimise = Trainer._optimise

    def watched(trainer, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimise(trainer, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_optimise", watched)
    settings = [f"training.device={device}", "training.epochs=2", "training.log_every=100"]
    settings += [f"decoder.kind={kind}", "training.checkpoint_every=0"]
    train(load_config(experiment, settings), tmp_path / "run")


@pytest.mark.parametrize("device", [CUDA])
def test_features_stay_on_the_gpu_or_come_pinned(experiment, tmp_path, device, monkeypatch):
    settings = [f"training.device={device}", "training.deterministic=true"]
    config = load_config(experiment, [*settings, "training.epochs=2"])
    devices = []
    take = CachedInputs._take

    def watched(inputs, *args):
        x = take(inputs, *args)
        devices.append(x.device.type)
        return x

    monkeypatch.setattr(CachedInputs, "_take", watched)
    train(config, tmp_path / "kept")
    assert set(devices) == {"cuda"}
    devices.clear()
    monkeypatch.setattr("captioner.training.inputs.free_memory", lambda _: 0)
    train(config, tmp_path / "loaded")
    assert set(devices) == {"cpu"}
    assert_same_weights(tmp_path / "kept/last", tmp_path / "loaded/last")


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("tuned", ["", "features.9"], ids=["frozen", "tuned"])
def test_a_deterministic_run_ends_with_the_same_bits(experiment, tmp_path, device, tuned):
    settings = [f"training.device={device}", f"encoder.fine_tune_from={tuned}"]
    config = load_config(experiment, [*settings, "training.deterministic=true"])
    for name in ("one", "two"):
        train(config, tmp_path / name)
    assert_same_weights(tmp_path / "one/last", tmp_path / "two/last")
