"""Small real things that several tests share: drawn images, their captions, a model of them."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from browsers import chromium
from PIL import Image, ImageDraw
from served_pages import onnxruntime_web

from captioner.checksums import write_checksums
from captioner.config import DecoderConfig, SearchConfig
from captioner.data.dataset import pad
from captioner.data.preprocessing import Preprocessing
from captioner.data.vocabulary import Vocabulary
from captioner.inference.captioner import Captioner
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import save_checkpoint
from captioner.models.encoder import Encoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.page.writer import write_page

CONSTRAINED_SEARCH = {
    "min_length": 5,
    "no_repeat_ngram": 2,
    "no_repeat_word": True,
    "no_dangling_end": True,
    "forbidden": ["red square", "lime"],
}

COLOURS = ("red", "lime", "blue", "yellow")
SHAPES = ("disc", "square")
WORDS = {"red": "red", "lime": "bright green", "blue": "blue", "yellow": "yellow"}


@dataclass(frozen=True)
class Drawn:
    """A folder of images and their captions, not to be changed.

    Attributes:
        images: The folder.
        annotations: Its captions, COCO format.
        captions: The caption of each file name, which the tiny model gives.
    """

    images: Path
    annotations: Path
    captions: dict[str, str]

    @property
    def paths(self) -> list[Path]:
        return [self.images / name for name in self.captions]


def draw(colour: str, shape: str, width: int = 64, height: int = 64) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "disc" else pen.rectangle)(box, fill=colour)
    return image


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Eight images of several sizes."""
    folder = tmp_path_factory.mktemp("drawn")
    captions = {}
    for number, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
        name = f"{number:02}_{colour}_{shape}.png"
        (folder / "images").mkdir(exist_ok=True)
        draw(colour, shape, 64 + 8 * number, 64).save(folder / "images" / name)
        # Captions of different lengths, so that searches end at different steps.
        captions[name] = f"a {WORDS[colour]} {shape}" + " on white" * (number % 3 == 0)
    content = {
        "images": [{"id": 7 * i, "file_name": name} for i, name in enumerate(captions)],
        "annotations": [
            {"id": i, "image_id": 7 * i, "caption": text}
            for i, text in enumerate(captions.values())
        ],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return Drawn(folder / "images", folder / "captions.json", captions)


@pytest.fixture(scope="session")
def tiny_model(drawn: Drawn) -> CaptioningModel:
    """A random SqueezeNet at 48 px and a small decoder that has learnt the drawn images."""
    torch.manual_seed(0)
    # Not ImageNet's numbers, so that a test sees where the preprocessing comes from.
    preprocessing = Preprocessing("squash", 48, 48, "bicubic", (0.4, 0.5, 0.6), (0.3, 0.25, 0.2))
    vocabulary = Vocabulary.from_captions(drawn.captions.values())
    config = DecoderConfig(
        embedding_size=24, hidden_size=32, attention_size=16, feature_size=32, dropout=0.0
    )
    encoder = Encoder("squeezenet1_1", preprocessing)
    model = CaptioningModel(encoder, config, vocabulary, SearchConfig(3, 8, 0.7))
    return learn_by_heart(model, drawn, 120)


def learn_by_heart(model: CaptioningModel, drawn: Drawn, steps: int) -> CaptioningModel:
    """Train a captioner's decoder on the drawn images alone."""
    pixels = torch.stack([model.encoder.preprocessing(Image.open(path)) for path in drawn.paths])
    features = InferenceEncoder(model.encoder, torch.float32)(pixels).clone()
    token_ids = pad([[model.vocabulary.encode(text)] for text in drawn.captions.values()])
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=0.01)
    for _ in range(steps):
        output = model.decoder.teacher_forcing(features, token_ids)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(output.logits, output.targets).backward()
        optimizer.step()
    model.requires_grad_(False)
    return model.eval()


@pytest.fixture(scope="session")
def overflowing_model(tiny_model: CaptioningModel, drawn: Drawn) -> CaptioningModel:
    """The tiny model, but a black image makes its numbers overflow, so that it gives NaN.

    Weights on the CNN's channels that are 0 for the drawn images change no caption of theirs.
    """
    model = copy.deepcopy(tiny_model)
    encode = InferenceEncoder(model.encoder, torch.float32)
    preprocessing = model.encoder.preprocessing
    seen = encode(torch.stack([preprocessing(Image.open(path)) for path in drawn.paths]))
    black = encode(preprocessing(Image.new("RGB", (64, 64)))[None])
    channels = (seen.amax((0, 1)) == 0) & (black.amax((0, 1)) > 0.01)
    assert channels.any()
    weight = model.decoder.feature.weight
    weight[::2, channels], weight[1::2, channels] = 3e38, -3e38
    last = model.encoder.cnn.features[-1]
    for part, of_part in zip((last.expand1x1, last.expand3x3), channels.chunk(2), strict=True):
        part.weight[of_part] *= 1000
        part.bias[of_part] *= 1000
    return model


@pytest.fixture
def checkpoint(tiny_model: CaptioningModel, tmp_path: Path) -> Path:
    """The tiny model's checkpoint, to be used or damaged."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_checkpoint(tiny_model, directory, {"BLEU-4": 1.0})
    return directory


@pytest.fixture(scope="session")
def captioner(tiny_model: CaptioningModel) -> Captioner:
    return Captioner(tiny_model, "cpu", "float32")


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def exported_int8(tiny_model, tmp_path_factory):
    """The tiny captioner in int8."""
    from captioner.inference.onnx_export import export_captioner

    folder = tmp_path_factory.mktemp("exports") / "exported"
    export_captioner(tiny_model, folder, "int8")
    return folder


@pytest.fixture(scope="module")
def site(browser, exported_int8, tmp_path_factory):
    """A page with the tiny captioner, and one whose search has constraints."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(exported_int8, folder / "constrained")
    path = folder / "constrained/export.json"
    content = json.loads(path.read_text())
    content["search"] |= CONSTRAINED_SEARCH
    path.write_text(json.dumps(content))
    write_checksums(folder / "constrained")
    files = onnxruntime_web()
    write_page(folder / "page", exported_int8, files)
    write_page(folder / "constrained_page", folder / "constrained", files)
    return folder


@pytest.fixture
def context(browser):
    context = browser.new_context()
    yield context
    context.close()
