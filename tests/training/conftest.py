"""A small data set of plain colours and the experiment that trains on it."""

import json

import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from training_runs import COLOURS, EXPERIMENT


@pytest.fixture(scope="session")
def cnn_weights(tmp_path_factory):
    """Weights of a small CNN: random, but a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet1_1.safetensors"
    safetensors.torch.save_file(torchvision.models.squeezenet1_1().state_dict(), path)
    return path


@pytest.fixture
def experiment(tmp_path, cnn_weights):
    """The experiment file of a small data set: 24 training and 8 validation images."""
    (tmp_path / "images").mkdir()
    number = 0
    for split, count in (("train", 6), ("val", 2)):
        images, annotations = [], []
        for name, colour in COLOURS.items():
            for shade in range(count):
                number += 1
                file_name = f"{number:03}.png"
                shaded = tuple(max(0, c - 5 * shade - (split == "val")) for c in colour)
                Image.new("RGB", (60, 50), shaded).save(tmp_path / "images" / file_name)
                images.append({"id": number, "file_name": file_name})
                for text in (f"A plain {name} picture.", f"this is plain {name}"):
                    annotations.append(
                        {"id": len(annotations), "image_id": number, "caption": text}
                    )
        content = {"images": images, "annotations": annotations}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    text = EXPERIMENT.format(root=tmp_path.as_posix(), weights=cnn_weights.as_posix())
    path = tmp_path / "experiment.toml"
    path.write_text(text)
    return path
