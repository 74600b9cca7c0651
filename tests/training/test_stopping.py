"""Runs that end early, by signals, kills and too little memory: real processes, real signals."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from training_runs import (
    AT,
    ROOT,
    assert_last_is_of_the_last_step,
    assert_same_weights,
    read_log,
    wait_for_steps,
)

from captioner.experiment_file import load_config
from captioner.stopping import Stopped, StopSignals
from captioner.training.run import train

SETTINGS = ["training.epochs=4", "training.batch_size=2", "decoder.kind=show_and_tell"]


def losses(directory):
    return [(row["kind"], row["step"], row["loss"]) for row in read_log(directory)]


# --- Ctrl-C and SIGTERM -------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX's signals")
def test_ctrl_c_prints_a_line_that_goes_on_to_the_same_end(experiment, tmp_path):
    """From a real command line, whose paths have a space, in its own process."""
    train(load_config(experiment, SETTINGS), tmp_path / "whole")
    out = tmp_path / "a run"
    words = [sys.executable, str(ROOT / "tools/train.py"), str(experiment), *SETTINGS]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*words, "--output-dir", str(out)],
        env=os.environ | threads,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Where tests run in the background of a shell, SIGINT is ignored from the start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_steps(out, 5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    *_, notice, line = errors.splitlines()
    assert notice == "stopped by Ctrl-C; to go on:"
    assert shlex.split(line) == [*words, "--output-dir", str(out), "--resume"]
    assert (out / "last/training_state.pt").exists()
    assert len(read_log(out)) < len(read_log(tmp_path / "whole"))
    subprocess.run(line, shell=True, check=True, env=os.environ | threads, capture_output=True)
    assert_same_weights(tmp_path / "whole" / "last", out / "last")
    assert_same_weights(tmp_path / "whole" / "best", out / "best")
    assert losses(out) == losses(tmp_path / "whole")


def test_sigterm_keeps_the_step_in_flight(experiment, tmp_path, server):
    out = tmp_path / "run"
    argv = [experiment, "training.epochs=400", "training.patience=0", "--output-dir", out]
    process = server.start(*argv)
    wait_for_steps(out, 3)
    os.kill(process, signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; to go on:" in server.output.read_text()
    assert_last_is_of_the_last_step(out)


def test_ctrl_c_in_validation_begins_it_anew_when_resumed(experiment, tmp_path, server):
    train(load_config(experiment), tmp_path / "whole")
    out = tmp_path / "run"
    argv = [experiment, "--output-dir", out]
    validation = AT.format(place="validation.generate", when="True", signal="SIGINT")
    assert server.run(*argv, setup=validation) == 128 + signal.SIGINT
    steps = [row["step"] for row in read_log(out)]
    assert steps == list(range(1, 7))  # the first epoch's, and no line of its end
    train(load_config(experiment), out, resume=True)
    assert_same_weights(tmp_path / "whole" / "last", out / "last")
    assert losses(out) == losses(tmp_path / "whole")


def test_ctrl_c_before_training_says_what_to_do(experiment, tmp_path, server):
    out = tmp_path / "run"
    encoding = """
import captioner.training.inputs as inputs
def interrupted(*args):
    os.kill(os.getpid(), signal.SIGINT)
inputs.cached_features = interrupted
"""
    argv = [experiment, "training.epochs=1", "--output-dir", out]
    assert server.run(*argv, setup=encoding) == 128 + signal.SIGINT
    line = server.output.read_text().splitlines()[-1]
    assert line.strip() == f"captioner train {shlex.join(map(str, argv))}"  # there is no run yet
    assert server.run(*argv) == 0


def test_a_second_signal_ends_at_once(experiment, tmp_path, server):
    out = tmp_path / "run"
    once = AT.format(place="trainer.set_learning_rates", when="True", signal="SIGINT")
    twice = once.replace("if True:", "for _ in range(2):")
    code = server.run(experiment, "--output-dir", out, setup=twice)
    assert code == -signal.SIGINT
    assert "a second signal stops at once" in server.output.read_text()
    assert not (out / "last").exists()


def test_signals_are_as_before_after_a_run():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped), StopSignals():
        signal.raise_signal(signal.SIGTERM)
    with StopSignals() as deferred:
        deferred.deferred = True
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            deferred.raise_if_received()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_ignored_signals_stay_ignored_and_other_threads_change_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    terminate = signal.getsignal(signal.SIGTERM)
    handlers = []

    def in_thread():
        with StopSignals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert handlers == [terminate]


# --- kills ------------------------------------------------------------------------------------


# Just before ``best`` is written, between ``best`` and ``last``, and just after ``last``.
MOMENTS = [
    ("trainer.Trainer._save", "args[1] == 'best' and args[0].state.epoch == 2"),
    (
        "trainer.Trainer._save",
        "args[1:2] == ('last',) and len(args) > 2 and args[0].state.epoch == 2",
    ),
    ("trainer.log_line", "args[0].startswith('epoch 2')"),
]


def test_the_line_of_an_epoch_survives_a_kill_at_its_end(experiment, tmp_path, server):
    settings = ["training.learning_rate=0.1"]  # the second epoch is the best so far
    config = load_config(experiment, settings)
    train(config, tmp_path / "whole")
    for number, (place, when) in enumerate(MOMENTS):
        out = tmp_path / f"run{number}"
        setup = AT.format(place=place, when=when, signal="SIGKILL")
        code = server.run(experiment, *settings, "--output-dir", out, setup=setup)
        assert code == -signal.SIGKILL
        train(config, out, resume=True)
        rows = read_log(out)
        assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == [1, 2, 3]
        assert losses(out) == losses(tmp_path / "whole")
        assert_same_weights(tmp_path / "whole" / "best", out / "best")


# --- memory -----------------------------------------------------------------------------------

# Leaves a process no more memory than it has, from a certain place on. The system has got the
# memory of each gradient back (see TrainingServer), and would have to give it again.
SCARCE = """
import ctypes, resource
ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: no thread has memory of its own to fall back on
resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))  # memory is given back, see device.py
import captioner.training.trainer as trainer
original = trainer.Trainer.{place}
def limited(self, *args):
    if self.state.step == {step}:
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (1 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return original(self, *args)
trainer.Trainer.{place} = limited
"""
LARGE = ["decoder.hidden_size=600", "training.checkpoint_every=2", "training.epochs=1"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
def test_too_little_memory_for_a_batch_is_one_line(experiment, tmp_path, server):
    out = tmp_path / "run"
    setup = SCARCE.format(place="_optimise", step=2)
    assert server.run(experiment, *LARGE, "--output-dir", out, setup=setup) == 1
    output = server.output.read_text()
    assert "Traceback" not in output
    assert output.splitlines()[-1] == (
        "error: out of memory at step 3 on cpu with training.batch_size=4 images of "
        "training.captions_per_image=2 captions; start again with a smaller training.batch_size "
        "and training.accumulation_steps to make up for it, or fewer captions_per_image; "
        f"training.init_from={out}/last keeps what is learnt"
    )
    state = torch.load(out / "last/training_state.pt", weights_only=True)["train_state"]
    assert state["step"] == 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
def test_too_little_memory_for_validation_loses_no_step(experiment, tmp_path, server):
    out = tmp_path / "run"
    setup = SCARCE.format(place="caption", step=6)
    assert server.run(experiment, *LARGE, "--output-dir", out, setup=setup) == 1
    assert server.output.read_text().splitlines()[-1] == (
        "error: out of memory in validation on cpu with validation.batch_size=100; --resume goes "
        "on here with a smaller one"
    )
    train(load_config(experiment, [*LARGE, "validation.batch_size=2"]), out, resume=True)
    assert [row["step"] for row in read_log(out)] == [*range(1, 7), 6]
