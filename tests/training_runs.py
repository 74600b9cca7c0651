"""What tests of training share: the experiment, and what a run has left behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 40),
}
EXPERIMENT = """\
[data]
root = '{root}'
train_annotations = "train.json"
train_images = "images"
val_annotations = "val.json"
val_images = "images"
min_word_count = 1
cache_dir = '{root}/cache'
workers = 0
[encoder]
name = "squeezenet1_1"
weights = '{weights}'
[preprocessing]
image_size = 48
[decoder]
kind = "show_attend_tell"
embedding_size = 16
hidden_size = 24
attention_size = 8
dropout = 0.1
[training]
epochs = 3
batch_size = 4
captions_per_image = 2
learning_rate = 0.01
warmup_steps = 2
label_smoothing = 0.0
log_every = 1
precision = "float32"
device = "cpu"
[search]
max_length = 8
[wandb]
mode = "disabled"
sample_images = 2
"""


def make_experiment(folder: Path, weights: Path) -> Path:
    """Write images, captions and the experiment file; return the latter."""
    (folder / "images").mkdir()
    number = 0
    for split, count in (("train", 6), ("val", 2)):
        images, annotations = [], []
        for name, colour in COLOURS.items():
            for shade in range(count):
                number += 1
                file_name = f"{number:03}.png"
                shaded = tuple(max(0, c - 5 * shade - (split == "val")) for c in colour)
                Image.new("RGB", (60, 50), shaded).save(folder / "images" / file_name)
                images.append({"id": number, "file_name": file_name})
                for text in (f"A plain {name} picture.", f"this is plain {name}"):
                    annotations.append(
                        {"id": len(annotations), "image_id": number, "caption": text}
                    )
        content = {"images": images, "annotations": annotations}
        (folder / f"{split}.json").write_text(json.dumps(content))
    text = EXPERIMENT.format(root=folder.as_posix(), weights=weights.as_posix())
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def read_log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def weights_of(checkpoint):
    return safetensors.torch.load_file(checkpoint / "model.safetensors")


def assert_same_weights(one, other):
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


# --- training in processes of its own ---------------------------------------------------------

# Imports torch once, then forks a process for each line "setup code, arguments, output file".
SERVER = """
import gc, json, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from captioner.commands.train import main
import captioner.training.stages

gc.freeze()  # else each child takes a second to collect, when it ends, what was imported here
for line in sys.stdin:
    setup, argv, output = json.loads(line)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        exec(setup)
        sys.exit(main(argv))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class TrainingServer:
    """Runs ``captioner train`` in real processes, one at a time, without importing torch each time.

    Attributes:
        output: A file with what the last process has printed.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            # Memory that is freed goes back to the system, but where keep_freed_memory is used.
            | {"MALLOC_MMAP_THRESHOLD_": "1048576"},
            text=True,
        )

    def start(self, *argv: object, setup: str = "") -> int:
        """Start training; return the process's id. ``setup`` is code that is run before."""
        line = json.dumps([setup, list(map(str, argv)), str(self.output)])
        print(line, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """Return the exit code of the process; minus a signal that killed it."""
        return int(self._process.stdout.readline())

    def run(self, *argv: object, setup: str = "") -> int:
        self.start(*argv, setup=setup)
        return self.wait()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# Sends a signal to the process itself at the first call of a function for which a condition holds.
AT = """
import captioner.training.run as run, captioner.training.stages as stages
import captioner.training.trainer as trainer, captioner.training.validation as validation
original = {place}
def signalled(*args, **kwargs):
    if {when}:
        os.kill(os.getpid(), signal.{signal})
    return original(*args, **kwargs)
{place} = signalled
"""


def assert_last_is_of_the_last_step(directory: Path) -> None:
    """The checkpoint holds the step that was logged last: none was lost, none was half done."""
    packed = torch.load(directory / "last/training_state.pt", weights_only=True)
    assert packed["train_state"]["step"] == read_log(directory)[-1]["step"]


def wait_for_steps(directory: Path, count: int, seconds: float = 60) -> None:
    """Wait until a run has logged so many lines."""
    log, deadline = directory / "log.jsonl", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.001)
    raise AssertionError(f"{log}: fewer than {count} lines after {seconds} s")
