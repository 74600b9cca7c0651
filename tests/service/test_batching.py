"""Models' threads: what is left out of a batch, and what concerns one job alone."""

import functools
import threading

import pytest
import torch
from PIL import Image
from running import wait_until

from captioner.config import SearchConfig
from captioner.errors import ConfigError
from captioner.inference.captioner import Captioner
from captioner.service.batching import Batcher
from captioner.service.captioning import Order, Wish, caption_orders

WAIT = 0.5  # seconds that a batch waits here


@pytest.fixture
def pixels(tiny_model, drawn) -> torch.Tensor:
    """(8, 3, S, S)."""
    preprocessing = tiny_model.encoder.preprocessing
    return torch.stack([preprocessing.load(path) for path in drawn.paths])


def test_what_is_cancelled_is_left_out(captioner, drawn, pixels):
    sizes = []
    batcher = Batcher(
        [functools.partial(caption_orders, captioner)],
        8,
        WAIT,
        observe=lambda size, seconds: sizes.append(size),
    )
    wish = Wish(captioner.search())
    results = [batcher.submit(Order(each, wish)) for each in pixels[:5]]
    assert results[1].cancel()
    assert results[3].cancel()
    texts = [results[place].result(30)[0].text for place in (0, 2, 4)]
    assert texts == [drawn.captions[drawn.paths[place].name] for place in (0, 2, 4)]
    assert not results[0].cancel()
    batcher.close()
    assert sizes == [3]


def test_a_batch_of_nothing_but_cancelled_jobs_is_none(captioner, pixels):
    sizes = []
    batcher = Batcher(
        [functools.partial(caption_orders, captioner)],
        8,
        WAIT,
        observe=lambda size, seconds: sizes.append(size),
    )
    assert all(batcher.submit(Order(each, Wish(captioner.search()))).cancel() for each in pixels)
    batcher.close()
    assert sizes == []


def test_what_fails_fails_alone(overflowing_model, drawn, pixels):
    """A word that the model can't say, and an image that makes it overflow."""
    captioner = Captioner(overflowing_model, "cpu", "float32")
    batcher = Batcher([functools.partial(caption_orders, captioner)], 8, WAIT)
    good, wrong = Wish(captioner.search()), Wish(captioner.search(forced=["zebra"]))
    black = overflowing_model.encoder.preprocessing(Image.new("RGB", (64, 64)))
    jobs = [(pixels[0], good), (pixels[1], wrong), (black, good), (pixels[2], good)]
    results = [batcher.submit(Order(*job)) for job in jobs]
    batcher.close()
    assert results[0].result()[0].text == drawn.captions[drawn.paths[0].name]
    with pytest.raises(ConfigError, match="'zebra' can't be written"):
        results[1].result()
    assert results[2].result() == []
    assert results[3].result()[0].text == drawn.captions[drawn.paths[2].name]


def test_closing_captions_what_is_there_at_once(captioner, drawn, pixels):
    sizes = []
    batcher = Batcher(
        [functools.partial(caption_orders, captioner)],
        3,
        60.0,
        observe=lambda size, seconds: sizes.append(size),
    )
    results = [batcher.submit(Order(each, Wish(captioner.search()))) for each in pixels]
    batcher.close()
    texts = [result.result(0)[0].text for result in results]
    assert texts == [drawn.captions[path.name] for path in drawn.paths]
    assert sizes == [3, 3, 2]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(Order(pixels[0], Wish(captioner.search())))


def test_free_models_share_what_there_is(pixels):
    """Eight images that come at once are two batches of four, and what comes later waits."""
    wish, sizes, go_on = Wish(SearchConfig()), [], threading.Event()

    def model(orders):
        sizes.append(len(orders))
        go_on.wait(30)
        return [[] for _ in orders]

    batcher = Batcher([model, model], 8, WAIT)
    results = [batcher.submit(Order(each, wish)) for each in pixels]
    wait_until(lambda: len(sizes) == 2)
    results += [batcher.submit(Order(each, wish)) for each in pixels[:3]]
    go_on.set()
    assert all(result.result(30) == [] for result in results)
    batcher.close()
    assert sizes[:2] == [4, 4]
    assert sum(sizes) == 11


@pytest.mark.parametrize("others_come", [False, True])
def test_an_image_waits_only_where_others_come(pixels, others_come):
    wish, sizes, answered = Wish(SearchConfig()), [], threading.Event()

    def model(orders):
        sizes.append(len(orders))
        return [[] for _ in orders]

    batcher = Batcher([model], 2, 3600.0, lambda: others_come)
    batcher.submit(Order(pixels[0], wish)).add_done_callback(lambda _: answered.set())
    assert answered.wait(0.5) != others_come
    batcher.submit(Order(pixels[1], wish)).result(30)
    batcher.close()
    assert sizes == ([2] if others_come else [1, 1])
