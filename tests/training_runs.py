"""What tests of training share: the experiment, and what a run has left behind."""

import json

import safetensors.torch
import torch

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


def read_log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def weights_of(checkpoint):
    return safetensors.torch.load_file(checkpoint / "model.safetensors")


def assert_same_weights(one, other):
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
