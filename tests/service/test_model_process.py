"""A model in a process of its own: the same captions, and what becomes of it when it dies."""

import shutil

import pytest
import torch

from captioner.errors import CaptionerError, CheckpointError, ConfigError
from captioner.service.captioning import ModelProcess, Order, Wish, caption_orders


@pytest.fixture
def process(checkpoint):
    process = ModelProcess(checkpoint, "cpu", "float32", 1)
    yield process
    process.close()


@pytest.fixture
def orders(captioner, drawn):
    load = captioner.preprocessing.load
    wish = Wish(captioner.search(n_best=2), attention=True)
    orders = [Order(load(path), wish) for path in drawn.paths]
    orders.append(Order(orders[0].pixels, Wish(captioner.search(forced=["zebra"]))))
    return orders


def test_answers_are_those_of_this_process(process, captioner, orders):
    process.wait_until_ready()
    expected = caption_orders(captioner, orders)
    for _ in range(2):
        *found, refusal = process.caption(orders)
        for ours, theirs in zip(found, expected, strict=False):
            assert [each.text for each in ours] == [each.text for each in theirs]
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one.attention, other.attention)
        assert isinstance(refusal, ConfigError)
        assert str(refusal) == str(expected[-1])
        process._worker._process.kill()  # the second time it is another one


def test_what_keeps_it_from_starting_is_told(process, checkpoint, orders):
    process._worker._process.kill()
    with pytest.raises(CaptionerError, match="the model's process was ended while it started"):
        process.wait_until_ready()
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        process.caption(orders)
