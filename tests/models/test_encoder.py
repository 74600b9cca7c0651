"""The CNN encoder against torchvision's own models, and every way to give it weights."""

import os
import re
import types

import pytest
import safetensors.torch
import torch
import torchvision

from captioner.config import PreprocessingConfig
from captioner.data.preprocessing import Preprocessing
from captioner.errors import CaptionerError, ConfigError, WeightsError
from captioner.models.encoder import Encoder, make_encoder
from captioner.models.inference_encoder import InferenceEncoder

SIZE = 64
SMALL = Preprocessing("squash", SIZE, SIZE)
# The width of the last feature map; at 64 px all of these have a grid of 2 x 2.
WIDTHS = {
    "resnet18": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "mobilenet_v2": 1280,
    "mobilenet_v3_large": 960,
    "efficientnet_b0": 1280,
    "convnext_tiny": 768,
    "vgg16": 512,
}
BATCH_NORM = torch.nn.BatchNorm2d


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def resnet():
    """A whole ResNet-18 whose batch-norm layers have seen something."""
    torch.manual_seed(0)
    return moved(torchvision.models.resnet18())


@pytest.fixture(scope="module")
def resnet_file(resnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    return path


def moved(model):
    """Give a model's batch norm statistics of its own, so that leaving them behind is seen."""
    for layer in model.modules():
        if isinstance(layer, BATCH_NORM):
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return model


def into_pooling(model, name, pixels, mean, std):
    """Return what torchvision's whole model feeds to its own global pooling."""
    seen = []
    if name == "mobilenet_v2":  # pools by a function
        hook = model.features.register_forward_hook(lambda _m, _i, out: seen.append(out))
    else:
        hook = model.avgpool.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    normalize = torchvision.transforms.Normalize(mean, std)
    with torch.inference_mode():
        logits = model.eval()(normalize(pixels.float() / 255))
    hook.remove()
    assert logits.shape == (len(pixels), 1000)
    return seen[0]


# --- the grid -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WIDTHS)
def test_the_grid_is_what_torchvisions_own_model_pools(name, pixels, tmp_path):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "vgg16" else {}  # quicker
    model = moved(torchvision.models.get_model(name, weights=None, **options))
    state = {key: v for key, v in model.state_dict().items() if not key.startswith("classifier.6")}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    encoder = make_encoder(
        name,
        str(tmp_path / "weights.safetensors"),
        PreprocessingConfig(resize="squash", image_size=SIZE),
    ).eval()
    preprocessing = encoder.preprocessing
    expected = into_pooling(model, name, pixels, preprocessing.mean, preprocessing.std)

    with torch.inference_mode():
        grid = encoder(pixels)
    assert grid.shape == (3, 4, WIDTHS[name])
    assert encoder.grid_shape == (4, WIDTHS[name])
    # Region n is row n // 2, column n % 2.
    regions = torch.stack([expected[:, :, n // 2, n % 2] for n in range(4)], dim=1)
    assert regions.std() > 0
    torch.testing.assert_close(grid, regions, rtol=1e-3, atol=1e-4 * regions.abs().max().item())
    pooled = torch.nn.functional.adaptive_avg_pool2d(expected, 1).flatten(1)
    torch.testing.assert_close(
        grid.mean(1), pooled, rtol=1e-3, atol=1e-4 * pooled.abs().max().item()
    )


@pytest.mark.parametrize("name", ["squeezenet1_1", "densenet121", "shufflenet_v2_x0_5"])
def test_cnns_whose_forward_does_more_than_its_modules(name, pixels):
    torch.manual_seed(0)
    model = moved(torchvision.models.get_model(name, weights=None)).eval()
    encoder = Encoder(name, SMALL).eval()
    encoder._load(model.state_dict(), "weights")
    normalize = torchvision.transforms.Normalize(SMALL.mean, SMALL.std)
    with torch.inference_mode():
        pooled = encoder(pixels).mean(1)
        if name == "squeezenet1_1":
            whole = model.features(normalize(pixels.float() / 255)).mean((2, 3))
            torch.testing.assert_close(pooled, whole, rtol=1e-4, atol=1e-4)
        else:
            head = model.classifier if name == "densenet121" else model.fc
            logits = model(normalize(pixels.float() / 255))
            torch.testing.assert_close(head(pooled), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_cnns_that_change_their_input_get_the_mean_and_std_that_come_out(name):
    # Torchvision's weights for these come with transform_input, which is no module.
    own = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    model = types.SimpleNamespace(transform_input=True)
    transform = getattr(
        torchvision.models, {"googlenet": "GoogLeNet", "inception_v3": "Inception3"}[name]
    )
    x = torch.rand(2, 3, 4, 4)
    expected = transform._transform_input(
        model, torchvision.transforms.Normalize(own.mean, own.std)(x)
    )
    changes = PreprocessingConfig(image_size=96)
    encoder = make_encoder(name, "none", changes)
    torch.testing.assert_close((x - encoder.mean) / encoder.std, expected, rtol=1e-4, atol=1e-5)


def test_one_image_is_the_same_alone_and_in_a_batch(resnet_file, pixels):
    encoder = make_encoder("resnet18", str(resnet_file), PreprocessingConfig(image_size=SIZE))
    with torch.inference_mode():
        together = encoder(pixels)
        alone = torch.cat([encoder(image[None]) for image in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_grid_is_measured_at_the_image_size():
    assert Encoder("resnet18", Preprocessing("squash", 96, 96)).grid_shape == (9, 512)
    assert Encoder("resnet18", Preprocessing("squash", 100, 100)).grid_shape == (16, 512)


@pytest.mark.parametrize(("name", "stage"), [("resnet18", "layer2"), ("vgg16", "features.29")])
def test_an_earlier_stage_gives_its_own_output_and_takes_whole_weights(name, stage, pixels):
    torch.manual_seed(0)
    model = moved(torchvision.models.get_model(name, weights=None)).eval()
    encoder = Encoder(name, SMALL, stage).eval()
    encoder._load(model.state_dict(), "weights")
    outputs = []
    model.get_submodule(stage).register_forward_hook(lambda *seen: outputs.append(seen[2]))
    normalize = torchvision.transforms.Normalize(SMALL.mean, SMALL.std)
    with torch.inference_mode():
        model(normalize(pixels.float() / 255))
        grid = encoder(pixels)
    assert encoder.grid_shape == tuple(grid.shape[1:])
    expected = outputs[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(grid, expected, rtol=1e-4, atol=1e-4)
    assert encoder.stages[-1] == stage
    with pytest.raises(ConfigError, match="last_stage"):
        Encoder(name, SMALL, "layer9")


# --- preprocessing --------------------------------------------------------------------------


def test_preprocessing_comes_from_the_weights():
    own = make_encoder("efficientnet_b0", "none").preprocessing
    assert own == Preprocessing("crop", 224, 256, "bicubic")
    # A file or none at all takes that of torchvision's default weights.
    assert make_encoder("resnet18", "none").preprocessing == Preprocessing()


def test_preprocessing_may_be_changed():
    def made(**changes):
        return make_encoder("resnet18", "none", PreprocessingConfig(**changes)).preprocessing

    assert made(image_size=112) == Preprocessing(image_size=112, resize_size=128)
    assert made(image_size=112, resize_size=112) == Preprocessing(image_size=112, resize_size=112)
    assert made(resize_size=224).resize_size == 224
    assert made(resize="squash", interpolation="bicubic").interpolation == "bicubic"
    changed = made(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    assert (changed.mean, changed.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    with pytest.raises(ConfigError, match=r"resize_size \(100\) must be at least .* \(224\)"):
        made(resize_size=100)


# --- weights in files -----------------------------------------------------------------------


def headless(state):
    return {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a.pth", lambda state: state),
        ("a.pth", headless),
        ("a.pth", lambda state: {f"module.{key}": tensor for key, tensor in state.items()}),
        ("a.pth", lambda state: {"state_dict": state, "epoch": 3}),
        ("a.pth", lambda state: {"model": {f"module.{k}": v for k, v in state.items()}}),
        ("a.pth", lambda state: {k: v for k, v in state.items() if "num_batches" not in k}),
        ("a.pth", lambda state: {k: torch.nn.Parameter(v.float()) for k, v in state.items()}),
        ("a.safetensors", lambda state: state),
        ("a.safetensors", headless),
    ],
)
def test_state_dict_files(tmp_path, resnet, resnet_file, pixels, name, change):
    path = tmp_path / name
    state = change(resnet.state_dict())
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    encoder = make_encoder("resnet18", str(path), PreprocessingConfig(image_size=SIZE))
    for key, tensor in encoder.cnn.state_dict().items():
        if "num_batches" not in key:
            assert torch.equal(tensor, resnet.state_dict()[key])


def test_a_file_from_the_home_folder(resnet_file, monkeypatch, resnet):
    monkeypatch.setenv("HOME", str(resnet_file.parent))
    encoder = make_encoder("resnet18", "~/resnet18.pth", PreprocessingConfig(image_size=SIZE))
    assert torch.equal(encoder.cnn.conv1.weight, resnet.conv1.weight)


def refusal(name, weights, kind=WeightsError):
    with pytest.raises(kind) as caught:
        make_encoder(name, str(weights), PreprocessingConfig(image_size=SIZE))
    assert isinstance(caught.value, CaptionerError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_weights_of_another_cnn_are_refused_by_name(resnet_file):
    message = refusal("mobilenet_v2", resnet_file)
    assert message.startswith(f"{resnet_file}: these are not the weights of mobilenet_v2")
    assert "are missing (features.0.0.weight" in message


def test_the_weights_of_a_deeper_or_shallower_cnn_are_refused(resnet_file, tmp_path):
    # ResNet-34 has all of ResNet-18's tensors, by name and shape, and 80 more.
    assert re.search(r"80 are missing \(layer1\.2\.conv1", refusal("resnet34", resnet_file))
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    message = refusal("resnet18", tmp_path / "resnet34.pth")
    assert re.search(r"not the weights of resnet18, .* 96 are too many \(layer1\.2\.conv1", message)


def test_weights_of_another_shape_are_refused_by_name(tmp_path, resnet):
    state = resnet.state_dict()
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(state, tmp_path / "a.pth")
    message = refusal("resnet18", tmp_path / "a.pth")
    assert "1 are of another shape (conv1.weight)" in message


class Trap:
    """What would make a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_booby_trapped_file_is_refused_and_does_nothing(tmp_path, resnet, hidden, legacy):
    sprung = tmp_path / "sprung"
    state = {**resnet.state_dict(), "trap": Trap(sprung)} if hidden else Trap(sprung)
    path = tmp_path / "trap.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    message = refusal("resnet18", path)
    assert message.startswith(f"{path}: not a plain state_dict of tensors (it calls ")
    assert "mkdir" in message
    assert not sprung.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert sprung.is_dir()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello world\n", b"<!DOCTYPE html>", b"PK\x03\x04aaaa", b"\x80\x05K\x01.", bytes(5000)],
)
def test_files_that_are_no_weights(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    message = refusal("resnet18", path)
    assert message.startswith(f"{path}: not a plain state_dict")
    assert "weights_only" not in message  # torch's advice is to run the code after all


def test_damaged_files_never_raise_anything_else(tmp_path):
    path = tmp_path / "a.pth"
    generator = torch.Generator().manual_seed(0)
    encoder = Encoder("squeezenet1_1", SMALL)
    for legacy in (False, True):
        state = {"a": torch.ones(3)}
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        good = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(good)
            for position in torch.randint(len(good), (4,), generator=generator).tolist():
                damaged[position] = int(torch.randint(256, (), generator=generator))
            path.write_bytes(damaged)
            with pytest.raises(WeightsError):
                encoder.load_weights(str(path))


@pytest.mark.parametrize("state", [{1: torch.ones(2)}, [torch.ones(2)], {"a": 3}, torch.ones(2)])
def test_files_that_hold_something_else(tmp_path, state):
    torch.save(state, tmp_path / "a.pth")
    assert "a state_dict (tensors by name) was expected" in refusal("resnet18", tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "long", "home"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, kind, suffix):
    path = tmp_path / f"a.{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path = "a" * 300 if kind == "long" else "~nobody-of-that-name/a.pth"
    assert "is neither a file nor weights of squeezenet1_1" in refusal("squeezenet1_1", path)


# --- names ----------------------------------------------------------------------------------


def test_an_unknown_cnn_gets_the_nearest(tmp_path):
    message = refusal("resnet5O", "none", ConfigError)
    assert message == "encoder.name: torchvision has no CNN 'resnet5O'; did you mean 'resnet50'?"


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_transformers_are_refused_in_one_line(name):
    message = refusal(name, "none", ConfigError)
    assert f"'{name}' gives no feature map for 64 x 64 pixels" in message
    assert "expected a CNN such as resnet50" in message


def test_an_image_too_small_for_the_cnn_is_refused():
    with pytest.raises(ConfigError, match="gives no feature map for 8 x 8 pixels"):
        make_encoder("inception_v3", "none", PreprocessingConfig(image_size=8))


def test_unknown_weights_get_the_nearest_and_all():
    message = refusal("resnet50", "IMAGENET1K_V3")
    assert "'IMAGENET1K_V3' is neither a file nor weights of resnet50; did you mean" in message
    assert "(torchvision has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, none)" in message
    assert "'no/such.pth' is neither a file nor" in refusal("resnet50", "no/such.pth")


# --- torchvision's own weights --------------------------------------------------------------


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_without_a_network_the_url_and_the_way_out_are_named(torch_home, monkeypatch):
    # Whatever network there is, this port of this machine answers nobody.
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    message = refusal("squeezenet1_1", "DEFAULT")
    assert "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth" in message
    assert "can't be downloaded" in message
    assert "copy the file here and give its path as encoder.weights" in message
    assert not list(torch_home.iterdir())


def test_a_pipe_among_the_downloaded_weights_is_not_waited_for(torch_home):
    path = torch_home / "squeezenet1_1-b8a52dc0.pth"
    os.mkfifo(path)
    message = refusal("squeezenet1_1", "DEFAULT")
    assert message.startswith(f"{path}: not the weights of https://")
    assert "not a regular file" in message


def test_weights_that_were_downloaded_before_are_used(torch_home):
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1()
    torch.save(model.state_dict(), torch_home / "squeezenet1_1-b8a52dc0.pth")
    encoder = make_encoder("squeezenet1_1", "IMAGENET1K_V1")
    assert torch.equal(encoder.cnn.features[0].weight, model.features[0].weight)
    assert encoder.preprocessing == Preprocessing()


def test_a_damaged_or_booby_trapped_download_is_refused(torch_home, tmp_path):
    path = torch_home / "squeezenet1_1-b8a52dc0.pth"
    path.write_bytes(b"half a file")
    assert f"{path}: not the weights of https://" in refusal("squeezenet1_1", "DEFAULT")
    torch.save({"trap": Trap(tmp_path / "sprung")}, path)
    message = refusal("squeezenet1_1", "DEFAULT")
    assert "delete it, and it is downloaded again" in message
    assert not (tmp_path / "sprung").exists()


# --- fine-tuning ----------------------------------------------------------------------------


def small(name):
    torch.manual_seed(0)
    return Encoder(name, SMALL)


def statistics(encoder):
    return {
        name: torch.cat([layer.running_mean, layer.running_var]).clone()
        for name, layer in encoder.cnn.named_modules()
        if isinstance(layer, BATCH_NORM)
    }


def inside(name, stages):
    return any(name == stage or name.startswith(f"{stage}.") for stage in stages)


@pytest.mark.parametrize(
    ("name", "stage", "trained"),
    [
        ("resnet18", "layer3", ["layer3", "layer4"]),
        ("resnet18", "all", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
        ("mobilenet_v2", "features.16", ["features.16", "features.17", "features.18"]),
        ("mobilenet_v3_large", "features.15", ["features.15", "features.16"]),
    ],
)
def test_fine_tuning_trains_these_stages_and_no_others(name, stage, trained, pixels):
    encoder = small(name)
    assert encoder.frozen
    encoder.fine_tune_from(stage)
    assert not encoder.frozen
    encoder.train()
    assert encoder.training
    before = statistics(encoder)
    grid = encoder(pixels)
    grid.square().mean().backward()
    wanted = {key for key, _ in encoder.cnn.named_parameters() if inside(key, trained)}
    assert wanted
    for key, parameter in encoder.cnn.named_parameters():
        assert parameter.requires_grad is (key in wanted)
        assert (parameter.grad is not None) is (key in wanted)
        assert key not in wanted or parameter.grad.isfinite().all()
    after = statistics(encoder)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if inside(key, trained)}

    encoder.eval()
    before = statistics(encoder)
    encoder(pixels)
    assert all(torch.equal(before[key], tensor) for key, tensor in statistics(encoder).items())


def test_a_frozen_encoder_stays_as_it_is_in_training_mode(pixels):
    encoder = small("resnet18").train()
    before = statistics(encoder)
    grid = encoder(pixels)
    assert not grid.requires_grad
    assert all(torch.equal(before[key], tensor) for key, tensor in statistics(encoder).items())
    assert torch.equal(grid, encoder.eval()(pixels))


def test_fine_tuning_may_be_taken_back():
    encoder = small("resnet18")
    encoder.fine_tune_from("layer2")
    encoder.fine_tune_from("")
    assert encoder.frozen
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.cnn.modules())


def test_an_unknown_stage_gets_the_nearest_or_all():
    encoder = small("resnet18")
    with pytest.raises(ConfigError, match=r"resnet18 has no stage 'layer5'; did you mean 'layer"):
        encoder.fine_tune_from("layer5")
    with pytest.raises(ConfigError, match="there are conv1, bn1, relu, maxpool, layer1, layer2"):
        encoder.fine_tune_from("zzz")


def test_stages_without_anything_to_train_are_refused():
    encoder = small("squeezenet1_1")
    encoder.cnn.features.append(torch.nn.ReLU())
    encoder.stages.append("features.13")
    with pytest.raises(ConfigError, match=r"squeezenet1_1 has nothing to train from"):
        encoder.fine_tune_from("features.13")


# --- fingerprint ----------------------------------------------------------------------------


def test_the_fingerprint_says_what_decides_the_features(resnet_file):
    def fingerprint(name="resnet18", weights=resnet_file, **changes):
        changes = PreprocessingConfig(**{"image_size": SIZE, **changes})
        return make_encoder(name, str(weights), changes).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(image_size=96) != first
    assert fingerprint(mean=(0.5, 0.5, 0.5)) != first
    assert fingerprint(resize="squash") != first
    encoder = make_encoder("resnet18", str(resnet_file), PreprocessingConfig(image_size=SIZE))
    encoder.cnn.layer4[1].bn2.running_var[5] += 1e-3
    other = encoder.fingerprint()
    assert other["weights_sha256"] != first["weights_sha256"]
    assert {**other, "weights_sha256": ""} == {**first, "weights_sha256": ""}


# --- for inference ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("mobilenet_v2", "resnet18", "squeezenet1_1", "densenet121", "efficientnet_b0"),
        *("convnext_tiny", "googlenet", "shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5"),
    ],
)
def test_fast_encoder_is_the_same_function(name):
    """Batch norm folded where it can be, whatever its statistics; the encoder stays as it was."""
    torch.manual_seed(0)
    encoder = Encoder(name, Preprocessing("squash", 64)).eval()
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    before = encoder.fingerprint()
    pixels = torch.randint(0, 256, (11, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder(pixels)
    size = expected.abs().max()
    found = InferenceEncoder(encoder, torch.float32)(pixels)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 * size
    rough = InferenceEncoder(encoder, torch.bfloat16)(pixels)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - expected).abs().mean() < 0.05 * expected.abs().mean() + 1e-3 * size
    assert encoder.fingerprint() == before
    with torch.no_grad():
        assert torch.equal(encoder(pixels), expected)


def test_fast_encoder_leaves_fine_tuning_alone():
    encoder = Encoder("resnet18", Preprocessing("squash", 64))
    encoder.fine_tune_from("layer4")
    encoder.train()
    InferenceEncoder(encoder, torch.bfloat16)
    assert encoder.cnn.layer4.training
    assert not encoder.cnn.layer3.training
    assert encoder.cnn.layer4[0].conv1.weight.requires_grad
    assert InferenceEncoder(encoder, torch.float32)(
        torch.empty(0, 3, 64, 64, dtype=torch.uint8)
    ).shape == (0, 4, 512)
