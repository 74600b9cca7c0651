"""What training sees of images that are changed at random: pixels anew each epoch, cached views."""

import dataclasses
import json
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import assert_same_weights, read_log, wait_for_steps

from captioner.config import AugmentationConfig
from captioner.data.augmentation import of_epoch, of_view, views_of_epoch
from captioner.data.preprocessing import Preprocessing
from captioner.errors import CacheError, ImageError
from captioner.experiment_file import load_config
from captioner.models.captioning_model import CaptioningModel
from captioner.models.encoder import Encoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.training import feature_cache, feature_encoder
from captioner.training.distributed import Processes
from captioner.training.feature_store import FeatureStore, hash_file, list_stores
from captioner.training.inputs import CachedInputs, loaded_ahead, prepare_inputs
from captioner.training.run import load_splits, train

CPU = torch.device("cpu")
ALL = ["augmentation.crop=0.4", "augmentation.flip=true", "augmentation.colour=0.3"]
VIEWS = [*ALL, "augmentation.views=3"]
TUNED = ["encoder.fine_tune_from=features.12", "encoder.learning_rate=1e-4"]


@pytest.fixture
def dataset(experiment, tmp_path):
    """The 24 training images, no longer of one colour each; a caption of one says "right"."""
    random = np.random.default_rng(0)
    dataset, _ = load_splits(load_config(experiment))
    for path in dataset.paths:
        noise = Image.fromarray(random.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        noise.resize((60, 50), Image.Resampling.BICUBIC).save(path)
    dataset.captions[7].append("a car to the right of a tree")
    return dataset


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder("squeezenet1_1", Preprocessing("squash", 48))


def prepare(encoder, dataset, config, training=True):
    model = CaptioningModel(encoder, config.decoder, ["a"], config.search)
    return prepare_inputs(model, dataset, config, CPU, torch.float32, training)


def all_of(inputs, epoch=0, count=24):
    """Return what an epoch gives for all images, in their order."""
    batches = [list(range(i, min(i + 5, count))) for i in range(0, count, 5)]
    parts = list(inputs.batches(batches, epoch))
    assert [images for images, _ in parts] == batches
    return torch.cat([x for _, x in parts])


# --- a CNN that is trained ----------------------------------------------------------------------


@pytest.fixture
def trained(encoder):
    encoder.fine_tune_from("features.12")
    yield encoder
    encoder.fine_tune_from("")


def test_each_epoch_changes_training_images_anew_and_validation_never(
    trained, dataset, experiment, capsys
):
    config = load_config(experiment, [*ALL, "training.seed=3"])
    _, inputs = prepare(trained, dataset, config)
    assert "augmentation.flip: 1 of 24 images are never flipped" in capsys.readouterr().err
    images = [Image.open(path) for path in dataset.paths]
    may_flip = [number != 7 for number in range(24)]
    for epoch in (0, 1):
        expected = [
            trained.preprocessing(image, of_epoch(config.augmentation, may_flip, 3, epoch, number))
            for number, image in enumerate(images)
        ]
        assert torch.equal(all_of(inputs, epoch), torch.stack(expected))
    assert (all_of(inputs, 0) != all_of(inputs, 1)).flatten(1).any(1).all()
    _, plain = prepare(trained, dataset, config, training=False)
    pixels = torch.stack([trained.preprocessing(image) for image in images])
    assert torch.equal(all_of(plain, 0), pixels)
    assert torch.equal(all_of(plain, 5), pixels)
    assert not capsys.readouterr().err


def test_pixels_that_stay_the_same_are_read_once_where_they_fit(
    trained, dataset, experiment, tmp_path, monkeypatch
):
    paths = list(dataset.paths)
    paths[3] = tmp_path / "cut_short.png"
    paths[3].write_bytes(dataset.paths[3].read_bytes()[:200])
    damaged = dataclasses.replace(dataset, paths=paths)
    config = load_config(experiment, [*TUNED, "data.bad_images=skip"])
    readable, kept = prepare(trained, damaged, config)
    assert kept.kept.shape == (23, 3, 48, 48)
    monkeypatch.setattr("captioner.training.inputs.MOST_BYTES_KEPT", 23 * 3 * 48 * 48)
    _, read = prepare(trained, damaged, config)
    assert read.kept is None
    assert len(readable) == 23
    assert torch.equal(all_of(kept, count=23), all_of(read, count=23))
    order = [[7, 2, 2], [22]]
    for (images, x), (same, y) in zip(kept.batches(order), read.batches(order), strict=True):
        assert images == same
        assert torch.equal(x, y)


def test_what_has_no_effect_is_told(trained, dataset, experiment, capsys):
    prepare(trained, dataset, load_config(experiment, VIEWS))
    assert "augmentation.views=3 has no effect on a CNN that is trained" in capsys.readouterr().err
    trained.fine_tune_from("")
    prepare(trained, dataset, load_config(experiment, ALL))
    told = capsys.readouterr().err
    assert "no effect on a frozen CNN with augmentation.views=1; views=4 caches three" in told


def test_training_asks_for_its_epoch_and_validation_for_none(experiment, tmp_path, monkeypatch):
    asked, batches = [], CachedInputs.batches

    def recorded(inputs, indices, *epoch):
        asked.append((len(inputs.views), *epoch))
        return batches(inputs, indices, *epoch)

    monkeypatch.setattr(CachedInputs, "batches", recorded)
    train(load_config(experiment, [*VIEWS, "training.epochs=2"]), tmp_path / "run")
    assert asked == [(3, 0), (1,), (3, 1), (1,)]


@pytest.mark.parametrize("settings", [[*ALL, *TUNED], VIEWS], ids=["pixels", "views"])
def test_killed_in_an_epoch_and_resumed_equals_uninterrupted(
    dataset, experiment, tmp_path, settings, server
):
    overrides = [*settings, "training.checkpoint_every=4", "training.epochs=2"]
    train(load_config(experiment, overrides), tmp_path / "whole")
    out = tmp_path / "killed"
    process = server.start(experiment, *overrides, "--output-dir", out)
    wait_for_steps(out, 5)
    os.kill(process, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    train(load_config(experiment, [*overrides, "data.workers=2"]), out, resume=True)
    assert_same_weights(tmp_path / "whole/last", out / "last")
    losses = [[row["loss"] for row in read_log(d)] for d in (tmp_path / "whole", out)]
    assert losses[0] == losses[1]


# --- views of a frozen CNN ----------------------------------------------------------------------


def expected_views(encoder, dataset, settings):
    """Return the features of all views by way of the encoder alone: (views, images, N, D)."""
    contents = dict(enumerate(map(hash_file, dataset.paths)))
    may_flip = [number != 7 for number in range(len(dataset))]
    views = []
    for view in range(settings.views):
        pixels = []
        for number, path in enumerate(dataset.paths):
            change = of_view(settings, may_flip, contents, view, number) if view else None
            pixels.append(encoder.preprocessing(Image.open(path), change))
        views.append(InferenceEncoder(encoder, torch.float32)(torch.stack(pixels)))
    return torch.stack(views)


def test_each_epoch_trains_on_one_view_of_each_image(encoder, dataset, experiment, capsys):
    config = load_config(experiment, [*VIEWS, "training.seed=5"])
    _, inputs = prepare(encoder, dataset, config)
    told = capsys.readouterr().err
    assert (
        "augmentation.views=3: features of 48 changed images are to be computed: 0.0002 GB in"
        in told
    )
    expected = expected_views(encoder, dataset, config.augmentation)
    assert (expected[0] - expected[1]).abs().mean() > 0.05 * expected.abs().mean()
    for epoch in range(4):
        chosen = views_of_epoch(5, epoch, 24, 3)
        assert set(chosen) == {0, 1, 2}
        found = all_of(inputs, epoch).float()
        torch.testing.assert_close(found, expected[chosen, torch.arange(24)], rtol=1e-3, atol=1e-3)
    _, plain = prepare(encoder, dataset, config, training=False)
    torch.testing.assert_close(all_of(plain, 2).float(), expected[0], rtol=1e-3, atol=1e-3)


def test_views_are_encoded_once_and_shared_by_seeds_of_training(
    encoder, dataset, experiment, monkeypatch, capsys
):
    _, inputs = prepare(encoder, dataset, load_config(experiment, VIEWS))
    capsys.readouterr()
    monkeypatch.setattr(feature_encoder, "InferenceEncoder", lambda *_: pytest.fail("encoding"))
    order = list(reversed(range(24)))  # a view belongs to the image, wherever it is in the list
    _, other = prepare(encoder, dataset.select(order), load_config(experiment, VIEWS))
    assert "computed" not in capsys.readouterr().err
    for view, same in zip(inputs.views, other.views, strict=True):
        assert torch.equal(view.take(order), same.take(range(24)))
    prepare(encoder, dataset, load_config(experiment, [*VIEWS, "training.seed=9"]))
    prepare(encoder, dataset, load_config(experiment, [*ALL, "augmentation.views=2"]))


@pytest.mark.parametrize(
    "change", ["augmentation.crop=0.5", "augmentation.colour=0.2", "augmentation.seed=1"]
)
def test_other_settings_never_mix(encoder, dataset, experiment, change):
    config = load_config(experiment, [*VIEWS, change])
    _, inputs = prepare(encoder, dataset, load_config(experiment, VIEWS))
    _, other = prepare(encoder, dataset, config)
    plain, *changed = zip(inputs.views, other.views, strict=True)
    assert torch.equal(*(features.take(range(24)) for features in plain))
    for pair in changed:
        first, second = (features.take(range(24)) for features in pair)
        assert (first != second).flatten(1).any(1).all()
    stores = list_stores(inputs.views[0].store.folder.parent)
    assert sorted(store.details.rpartition(", ")[2] for store in stores) == (
        ["float32", "view 2", "view 2", "view 3", "view 3"]
    )


def test_the_same_image_with_other_captions_may_be_flipped(encoder, dataset, experiment):
    """In the cache, too, it is another version; both stay."""
    config = load_config(experiment, ["augmentation.flip=true", "augmentation.views=8"])
    _, held = prepare(encoder, dataset, config)
    captions = [["a tree"] for _ in range(24)]
    free_set = replace(dataset, captions=captions)
    _, free = prepare(encoder, free_set, config)
    _, again = prepare(encoder, dataset, config)
    pairs = [
        [inputs.views[view].take(range(24)) for inputs in (held, free, again)] for view in range(8)
    ]
    assert all(torch.equal(first, third) for first, _, third in pairs)
    assert all(torch.equal(first[7], pairs[0][0][7]) for first, _, _ in pairs)
    assert any(not torch.equal(first[7], second[7]) for first, second, _ in pairs)


def test_a_damaged_row_of_a_view_is_encoded_again_in_that_view(
    encoder, dataset, experiment, capsys
):
    config = load_config(experiment, VIEWS)
    _, inputs = prepare(encoder, dataset, config)
    expected = inputs.views[2].take(range(24))
    path = inputs.views[2].store.features_path
    content = bytearray(path.read_bytes())
    content[100] ^= 255
    path.write_bytes(content)
    _, inputs = prepare(encoder, dataset, config)
    capsys.readouterr()
    torch.testing.assert_close(inputs.views[2].take(range(24)), expected, rtol=1e-2, atol=1e-3)
    assert "1 rows have changed since they were written (0)" in capsys.readouterr().err
    assert path.read_bytes() != content


def test_space_for_all_views_is_asked_for_beforehand(encoder, dataset, experiment, monkeypatch):
    prepare(encoder, dataset, load_config(experiment))
    asked = []

    def full(store, count):
        asked.append(count)
        raise CacheError("full")

    monkeypatch.setattr(FeatureStore, "check_free_space", full)
    with pytest.raises(CacheError, match="full"):
        prepare(encoder, dataset, load_config(experiment, VIEWS))
    assert asked == [48]


def test_the_time_for_many_images_is_told(encoder, dataset, experiment, monkeypatch, capsys):
    monkeypatch.setattr(feature_cache, "MANY_IMAGES", 30)
    for module in (feature_cache, feature_encoder):
        monkeypatch.setattr(module, "ENCODE_BATCH_SIZE", 8)
    prepare(encoder, dataset, load_config(experiment, VIEWS))
    assert re.search(r", about \d+ s \(\d+ images/s\)", capsys.readouterr().err)


def test_images_that_cannot_be_read_are_left_out_of_all_views(encoder, dataset, experiment, capsys):
    dataset.paths[3].write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"1 of 24 images can't be read"):
        prepare(encoder, dataset, load_config(experiment, VIEWS))
    config = load_config(experiment, [*VIEWS, "data.bad_images=skip"])
    readable, inputs = prepare(encoder, dataset, config)
    told = capsys.readouterr().err
    assert told.count("not a readable image") == 1
    assert "features of 46 changed images" in told
    assert len(readable) == 23
    assert [len(view.rows) for view in inputs.views] == [23] * 3
    assert all_of(inputs, 1, 23).shape[0] == 23


def test_settings_of_a_view_are_in_its_store(encoder, dataset, experiment):
    _, inputs = prepare(encoder, dataset, load_config(experiment, VIEWS))
    meta = json.loads(inputs.views[2].store.meta_path.read_text())
    assert meta["augmentation"] == {"crop": 0.4, "flip": True, "colour": 0.3, "seed": 0, "view": 2}
    assert "augmentation" not in json.loads(inputs.views[0].store.meta_path.read_text())
    assert AugmentationConfig(**{k: v for k, v in meta["augmentation"].items() if k != "view"})


# --- at a GPU's pace ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [[], VIEWS], ids=["plain", "views"])
def test_features_on_the_device_are_those_of_the_cache(encoder, dataset, experiment, settings):
    _, inputs = prepare(encoder, dataset, load_config(experiment, settings))
    kept = inputs.on_device()
    assert kept.kept.shape == (len(inputs.views), 24, *inputs.views[0].stored.shape[1:])
    for epoch in (0, 1):
        assert torch.equal(all_of(kept, epoch), all_of(inputs, epoch))
    for (images, x), expected in zip(
        kept.batches([[7, 2], [], [2]]), [[7, 2], [], [2]], strict=True
    ):
        assert (images, len(x)) == (expected, len(expected))


def test_features_that_do_not_fit_stay_where_they_are(encoder, dataset, experiment, monkeypatch):
    _, inputs = prepare(encoder, dataset, load_config(experiment))
    size = inputs.on_device().kept.nbytes
    monkeypatch.setattr("captioner.training.inputs.free_memory", lambda _: 2 * size - 1)
    assert inputs.on_device() is inputs


def test_what_is_loaded_ahead_comes_in_order_and_ends_with_its_error():
    taken = []

    def items():
        for number in range(9):
            taken.append(number)
            if number == 6:
                raise ImageError("a disk that fails")
            yield number

    loaded = loaded_ahead(items())
    for number in range(6):
        assert next(loaded) == number
        assert len(taken) <= number + 5
    with pytest.raises(ImageError, match="fails"):
        next(loaded)
    endless = loaded_ahead(iter(int, 1))
    assert next(endless) == 0
    endless.close()  # and its thread ends


def test_the_cores_of_a_machine_are_shared(trained, dataset, experiment, monkeypatch):
    """Two processes with -1 workers: each takes half of the cores."""
    monkeypatch.setattr("captioner.training.inputs.count_cores", lambda: 12)
    config = load_config(experiment, ["data.workers=-1"])
    counts = []
    monkeypatch.setattr(
        "captioner.training.inputs._pixel_inputs",
        lambda _, dataset, config, *rest: counts.append(config.data.workers),
    )
    for count in (1, 2, 24):
        model = CaptioningModel(trained, config.decoder, ["a"], config.search)
        processes = Processes(0, count)
        prepare_inputs(model, dataset, config, CPU, torch.float32, processes=processes)
    assert counts == [-1, 6, 1]
