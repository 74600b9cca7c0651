"""The recipes train: all their stages and settings, made small, on real photographs of COCO."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from shared_data import SHARED
from training_runs import read_log

from captioner.commands.train import main as train
from captioner.experiment_file import load_stages

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
COCO_MINI = SHARED / "data/coco_mini"

SMALL = (
    *("preprocessing.image_size=32", "training.batch_size=40", "search.max_length=8"),
    *("decoder.hidden_size=16", "decoder.embedding_size=16", "decoder.attention_size=8"),
    *("decoder.feature_size=16", "data.min_word_count=2"),
    *("wandb.mode=disabled", "training.device=cpu", "validation.max_images=10"),
)


@pytest.fixture
def coco(tmp_path):
    """A folder as ``captioner download`` leaves it, of COCO's photographs and captions."""
    images = []
    for folder, split in {"train2017": "train", "val2017": "val"}.items():
        (tmp_path / folder).symlink_to(COCO_MINI / folder)
        content = json.loads((COCO_MINI / f"annotations/captions_{folder}.json").read_text())
        captions = {image["id"]: [] for image in content["images"]}
        for row in content["annotations"]:
            captions[row["image_id"]].append({"raw": row["caption"]})
        for number, image in enumerate(content["images"]):
            row = {"filepath": folder, "filename": image["file_name"], "cocoid": image["id"]}
            row["split"] = "restval" if split == "train" and number % 3 == 0 else split
            images.append(row | {"sentences": captions[image["id"]]})
    (tmp_path / "annotations").mkdir()
    listed = {"dataset": "coco", "images": images}
    (tmp_path / "annotations/dataset_coco2017.json").write_text(json.dumps(listed))
    return tmp_path


@pytest.mark.skipif(not COCO_MINI.exists(), reason="needs ../shared/data/coco_mini")
@pytest.mark.parametrize("name", ["coco_best.toml", "flickr8k_best.toml"])
def test_every_stage_of_a_recipe_trains(name, coco, tmp_path):
    data = [f"data.root={coco}", f"data.cache_dir={tmp_path / 'cache'}"]
    data += [
        f"data.{split}_annotations=annotations/dataset_coco2017.json" for split in ("train", "val")
    ]
    data += ["data.train_images=.", "data.val_images=."]
    recipe = load_stages(EXPERIMENTS / name)
    stages = [stage.name for stage in recipe]
    assert stages[-1] == "self_critical"
    epochs = [f"{stage}.training.epochs=1" for stage in stages]
    weights = tmp_path / "cnn.pth"  # random ones are refused where the CNN is frozen
    torch.save(torchvision.models.get_model(recipe[0].config.encoder.name).state_dict(), weights)
    epochs.append(f"encoder.weights={weights}")
    words = [str(EXPERIMENTS / name), *data, *SMALL, *epochs, "--output-dir", str(tmp_path / "run")]
    assert train(words) == 0
    for stage in stages:
        log = read_log(tmp_path / "run" / stage)
        assert [row["epoch"] for row in log if row["kind"] == "epoch"] == [1]
    assert (tmp_path / "run/best/model.safetensors").is_file()
    shutil.rmtree(tmp_path / "run")  # up to a gigabyte
