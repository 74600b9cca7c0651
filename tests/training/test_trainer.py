"""Training from image files to a checkpoint: real runs on a data set of plain colours."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import wandb_files
import yaml
from PIL import Image
from training_runs import (
    COLOURS,
    assert_same_weights,
    read_log,
    wait_for_steps,
    weights_of,
)

from captioner import Captioner
from captioner.commands.train import main as train_main
from captioner.config import TrainingConfig
from captioner.data.annotations import read_annotations
from captioner.data.dataset import pad
from captioner.data.predictions import read_predictions
from captioner.errors import CheckpointError, ConfigError, DataError, TrainingError
from captioner.experiment_file import load_config
from captioner.files import locked
from captioner.metrics.scores import METRICS, compute_metrics
from captioner.models.captioning_model import make_decoder
from captioner.models.decoder import DecoderOutput
from captioner.training.losses import caption_loss
from captioner.training.run import train
from captioner.training.schedule import learning_rate_factor
from captioner.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


def test_a_run_learns_and_leaves_everything_behind(experiment, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [str(experiment), "training.epochs=12", "training.patience=0", "wandb.mode=offline"]
    assert train_main([*argv, "--output-dir", str(out)]) == 0
    assert "BLEU-4" in capsys.readouterr().out

    # The captions name the colour of images that were not trained on.
    captioner = Captioner.from_pretrained(out / "best", device="cpu", precision="float32")
    for colour, rgb in COLOURS.items():
        caption = captioner.caption(Image.new("RGB", (60, 50), tuple(max(0, c - 3) for c in rgb)))
        assert colour in caption.split(), caption

    run = json.loads((out / "run.json").read_text())
    assert run["config"]["training"]["epochs"] == 12
    assert run["config"]["training"]["seed"] == 0
    session = run["sessions"][0]
    assert session["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", session["git"]["commit"])
    split = json.loads((out / "split.json").read_text())
    assert (len(split["train"]), len(split["val"])) == (24, 8)
    predictions = read_predictions(out / "best" / "val_predictions.json")
    assert list(predictions) == split["val"]

    log = read_log(out)
    steps = [line for line in log if line["kind"] == "step"]
    epochs = [line for line in log if line["kind"] == "epoch"]
    assert [line["step"] for line in steps] == list(range(1, 12 * 6 + 1))
    assert steps[0]["loss"] > 2 * steps[-1]["loss"]
    assert [line["epoch"] for line in epochs] == list(range(1, 13))
    best = max(line["BLEU-4"] for line in epochs)
    assert captioner.model.search.beam_size == 5
    assert json.loads((out / "best/config.json").read_text())["scores"]["BLEU-4"] == best

    # What Weights & Biases wrote, read back from its own file.
    (wandb_run,) = out.glob("wandb/offline-run-*/run-*.wandb")
    wandb_files.wait_for_exit(wandb_run)
    history = wandb_files.history(wandb_run)
    logged = [row for row in history if "train/loss" in row]
    assert [row["step"] for row in logged] == [line["step"] for line in steps]
    for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
        assert [row[f"train/{name}"] for row in logged] == [line[name] for line in steps]
    scored = [row["validation/BLEU-4"] for row in history if "validation/BLEU-4" in row]
    assert scored == [line["BLEU-4"] for line in epochs]
    assert wandb_files.config(wandb_run)["training"]["epochs"] == 12
    tables = sorted(wandb_run.parent.glob("files/media/table/validation/*.json"))
    assert len(tables) == 12
    table = json.loads(tables[-1].read_text())
    assert table["columns"] == ["epoch", "image", "caption", "references"]
    assert len(table["data"]) == 2
    assert "A plain red picture." in table["data"][0][3]
    models = models_of(wandb_run)
    assert "best" in models[-1].aliases
    assert "model.safetensors" in {entry.path for entry in models[-1].manifest.contents}


def models_of(wandb_run: Path) -> list:
    kinds = [
        record.artifact
        for record in wandb_files.read_records(wandb_run)
        if record.WhichOneof("record_type") == "artifact"
    ]
    return [artifact for artifact in kinds if artifact.type == "model"]


def test_the_checkpoint_stays_at_home_if_asked(experiment, tmp_path):
    overrides = ["training.epochs=1", "wandb.mode=offline", "wandb.log_checkpoint=false"]
    train(load_config(experiment, overrides), tmp_path / "run")
    (wandb_run,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    wandb_files.wait_for_exit(wandb_run)
    assert not models_of(wandb_run)
    whole = wandb_files.read_records(wandb_run)
    wandb_run.write_bytes(wandb_run.read_bytes()[:-3])  # as while its last record is written
    assert wandb_files.read_records(wandb_run) == whole[:-1]


def test_the_best_checkpoint_is_that_of_the_metric_asked_for(experiment, tmp_path):
    overrides = ["validation.metric=CIDEr-D", "training.epochs=9", "training.patience=0"]
    scores = train(load_config(experiment, overrides), tmp_path / "run")
    epochs = [line for line in read_log(tmp_path / "run") if line["kind"] == "epoch"]
    best = max(epochs, key=lambda line: line["CIDEr-D"])  # the first of equals
    assert best["CIDEr-D"] > epochs[0]["CIDEr-D"]
    assert {name: best[name] for name in scores} == scores
    assert scores.keys() == {*METRICS} - {"CIDEr", "METEOR", "SPICE"}
    kept = json.loads((tmp_path / "run/best/config.json").read_text())["scores"]
    assert kept["epoch"] == best["epoch"]
    for name in ("best", "last"):  # all its files have a checksum
        lines = (tmp_path / "run" / name / "SHA256SUMS").read_text().splitlines()
        listed = {line.split("  ")[1] for line in lines} | {"SHA256SUMS"}
        assert listed == {path.name for path in (tmp_path / "run" / name).iterdir()}
    predictions = read_predictions(tmp_path / "run/best/val_predictions.json")
    references = {
        image.image_id: image.captions for image in read_annotations(tmp_path / "val.json").images
    }
    again = compute_metrics(predictions, references, ["CIDEr-D"])
    assert again["CIDEr-D"] == best["CIDEr-D"]


@pytest.mark.parametrize("kind", ["show_attend_tell", "show_and_tell"])
def test_killed_and_resumed_equals_uninterrupted(experiment, tmp_path, kind, server):
    overrides = [f"decoder.kind={kind}", "training.checkpoint_every=4", "training.epochs=4"]
    train(load_config(experiment, overrides), tmp_path / "whole")

    out = tmp_path / "killed"
    process = server.start(experiment, *overrides, "--output-dir", out)
    wait_for_steps(out, 10)
    os.kill(process, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    interrupted = len(read_log_loosely(out))
    train(load_config(experiment, overrides), out, resume=True)

    assert interrupted < len(read_log(out))  # it was killed before it was done
    assert_same_weights(tmp_path / "whole" / "last", out / "last")
    assert_same_weights(tmp_path / "whole" / "best", out / "best")
    timeless = [
        [(row["kind"], row["step"], row["loss"]) for row in read_log(directory)]
        for directory in (tmp_path / "whole", out)
    ]
    assert timeless[0] == timeless[1]


def read_log_loosely(directory):
    return [line for line in (directory / "log.jsonl").read_text().splitlines() if line]


def test_resumed_run_is_the_same_run_in_wandb(experiment, tmp_path):
    out = tmp_path / "run"
    overrides = ["wandb.mode=offline", "training.patience=1", "training.learning_rate=1e-9"]
    train(load_config(experiment, overrides), out)  # no better score: stops early
    stopped_at = read_log(out)[-1]["epoch"]
    assert stopped_at < 3
    train(load_config(experiment, [*overrides, "training.patience=0"]), out, resume=True)
    assert read_log(out)[-1]["epoch"] == 3
    runs = sorted(out.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert runs[0].name == runs[1].name
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == 2


def test_resume_refuses_another_experiment(experiment, tmp_path):
    out = tmp_path / "run"
    train(load_config(experiment, ["training.epochs=1"]), out)
    with pytest.raises(ConfigError, match="--resume"):
        train(load_config(experiment), out)
    with pytest.raises(CheckpointError, match=r"decoder\.cell = 'lstm'.*'gru'"):
        train(load_config(experiment, ["training.epochs=1", "decoder.cell=gru"]), out, resume=True)


def test_resume_refuses_captions_that_have_changed(experiment, tmp_path):
    """The words are the same: the vocabulary alone does not show it."""
    out, config = tmp_path / "run", load_config(experiment, ["training.epochs=1"])
    train(config, out)
    for split in ("train", "val"):
        path = Path(config.data.root) / f"{split}.json"
        before = path.read_text()
        content = json.loads(before)
        content["annotations"][0]["caption"] += "."  # the words stay the same
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=f"of the {split} split have changed"):
            train(config, out, resume=True)
        path.write_text(before)
    train(config, out, resume=True)


def test_resume_refuses_another_precision(experiment, tmp_path):
    out, config = tmp_path / "run", load_config(experiment, ["training.epochs=1"])
    train(config, out)
    path = out / "last/training_state.pt"
    state = torch.load(path, weights_only=True)
    state["circumstances"]["precision"] = "float16"
    torch.save(state, path)
    path.with_name("SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="computed in float16, and here it would be"):
        train(config, out, resume=True)


def test_a_step_waits_for_the_device_once(experiment, tmp_path, monkeypatch):
    """On a GPU each number that is read is a wait for it: loss and norm are read together."""
    reads = []
    for name in ("__float__", "item", "tolist", "__bool__"):
        original = getattr(torch.Tensor, name)

        def read(tensor, original=original, name=name):
            if tensor.is_floating_point():  # token ids are on the CPU
                reads.append(name)
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, read)
    counts = []
    optimise = Trainer._optimise

    def counted(*args):
        reads.clear()
        optimise(*args)
        counts.append(list(reads))

    monkeypatch.setattr(Trainer, "_optimise", counted)
    train(load_config(experiment, ["training.epochs=1", "training.log_every=2"]), tmp_path / "run")
    assert counts == [["tolist"]] * 6


def test_resume_refuses_the_state_of_an_earlier_version(experiment, tmp_path):
    out, config = tmp_path / "run", load_config(experiment, ["training.epochs=1"])
    train(config, out)
    path = out / "last/training_state.pt"
    state = torch.load(path, weights_only=True)
    del state["format"]
    torch.save(state, path)
    path.with_name("SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="another version of captioner"):
        train(config, out, resume=True)


def test_a_second_process_is_kept_out_of_a_run(experiment, tmp_path, server):
    """Two start at the same time: the second is refused before it does anything else."""
    out = tmp_path / "run"
    out.mkdir()
    with locked(out / ".lock", "busy"):
        assert server.run(experiment, "--output-dir", out) == 1
    (line,) = server.output.read_text().splitlines()
    assert line.startswith(f"error: {out}: another process is training")
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert not (tmp_path / "cache").exists()


def test_the_log_goes_on_from_the_state(experiment, tmp_path):
    """Lines after the last state are dropped, since what they say is computed again."""
    out, config = tmp_path / "run", load_config(experiment, ["training.epochs=1"])
    train(config, out)
    log = out / "log.jsonl"
    before = log.read_bytes()
    assert json.loads(before.splitlines()[-1])["kind"] == "epoch"
    log.write_bytes(before + b'{"kind": "step", "step": 99}\n{"kind": "ste')
    train(config, out, resume=True)
    assert log.read_bytes() == before


def test_resume_never_runs_code_from_the_state(experiment, tmp_path):
    out = tmp_path / "run"
    train(load_config(experiment, ["training.epochs=1"]), out)
    torch.save({"config": _Trap(tmp_path / "trapped")}, out / "last" / "training_state.pt")
    (out / "last/SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="training_state"):
        train(load_config(experiment, ["training.epochs=1"]), out, resume=True)
    assert not (tmp_path / "trapped").exists()


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_non_finite_loss_stops_and_names_the_last_good_checkpoint(experiment, tmp_path, capsys):
    out = tmp_path / "run"
    train(load_config(experiment, ["training.epochs=3"]), out)
    state = torch.load(out / "last/training_state.pt", weights_only=True)
    state["train_state"]["epoch"] = 2
    torch.save(state, out / "last/training_state.pt")
    tensors = weights_of(out / "last")
    tensors["decoder.output.bias"].fill_(math.inf)
    safetensors.torch.save_file(tensors, out / "last/model.safetensors")
    (out / "last/SHA256SUMS").unlink()
    with pytest.raises(
        TrainingError, match=r"step 19: the loss is (nan|inf).*learning rate of .*last"
    ):
        train(load_config(experiment, ["training.epochs=3"]), out, resume=True)


def test_diverging_learning_rate_is_one_line(experiment, tmp_path, capsys):
    argv = [str(experiment), "training.learning_rate=1e30", "training.gradient_clip=0"]
    assert train_main([*argv, "--output-dir", str(tmp_path / "run")]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "no checkpoint is there" in errors[0]


def test_accumulated_batches_equal_one_large_batch():
    config = load_config(ROOT / "experiments/flickr8k_attention.toml").decoder
    config = replace(config, embedding_size=8, hidden_size=12, attention_size=6, feature_size=0)
    torch.manual_seed(0)
    decoder = make_decoder(replace(config, dropout=0.0), 20, 10).double()
    features = torch.rand(4, 9, 10, dtype=torch.float64)
    token_ids = pad([[[5, 6], [7]], [[4, 5, 6, 7]], [[8, 9, 10], [11, 12]], [[13]]])

    def gradients(parts):
        decoder.zero_grad()
        for part in parts:
            output = decoder.teacher_forcing(features[part], token_ids[part])
            caption_loss(output, 0.1, 1.0, tokens=19, captions=6).backward()
        return [parameter.grad.clone() for parameter in decoder.parameters()]

    whole = gradients([slice(0, 4)])
    for one, other in zip(whole, gradients([slice(0, 1), slice(1, 4)]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_by_norm_and_by_value(experiment, tmp_path, monkeypatch):
    """What the optimiser is given, in a run: the norm as logged was measured before the cut."""
    sizes = []
    step = torch.optim.AdamW.step

    def watched_step(optimizer, *args, **kwargs):
        gradients = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
        whole = torch.cat(gradients)
        sizes.append((float(whole.norm()), float(whole.abs().max())))
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    for name, settings in {
        "norm": ["training.gradient_clip=0.01"],
        "value": ["training.gradient_clip=0", "training.gradient_clip_value=0.001"],
    }.items():
        sizes.clear()
        config = load_config(experiment, ["training.epochs=1", *settings])
        train(config, tmp_path / name)
        norms, values = zip(*sizes, strict=True)
        rows = [r for r in read_log(tmp_path / name) if r["kind"] == "step"]
        logged = [row["gradient_norm"] for row in rows]
        assert min(logged) > 0.01
        if name == "norm":
            assert max(norms) == pytest.approx(0.01, rel=1e-3)
        else:
            assert max(values) == pytest.approx(0.001)
            assert all(after < before for after, before in zip(norms, logged, strict=True))


@pytest.mark.parametrize("kind", ["show_and_tell", "show_attend_tell"])
def test_gradient_flow_is_logged_and_drawn_and_changes_nothing(experiment, tmp_path, kind):
    settings = [f"decoder.kind={kind}", "training.epochs=1", "decoder.layers=2"]
    train(load_config(experiment, settings), tmp_path / "without")
    flow = ["training.gradient_flow_every=3", "training.bptt_window=0"]
    train(load_config(experiment, settings + flow), tmp_path / "with")
    weights = [(tmp_path / n / "last/model.safetensors").read_bytes() for n in ("with", "without")]
    assert weights[0] == weights[1]
    rows = [r for r in read_log(tmp_path / "with") if r["kind"] == "gradient_flow"]
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        assert len(row["loss"]) == len(row["end"]) == 2
        assert [sorted(layer) for layer in row["end"]] == [["c", "h", "state"]] * 2
        assert all(value > 0 for layer in row["end"] for norms in layer.values() for value in norms)
    with Image.open(tmp_path / "with/gradient_flow.png") as picture:
        assert picture.width > 300
    assert not (tmp_path / "without/gradient_flow.png").exists()


def test_a_window_trains_and_a_run_from_before_there_were_windows_goes_on(experiment, tmp_path):
    """New settings are missing in an old run's state: they take their defaults."""
    settings = ["training.epochs=1", "training.bptt_window=2"]
    train(load_config(experiment, settings), tmp_path / "window")
    train(load_config(experiment, settings[:1]), tmp_path / "old")
    weights = [(tmp_path / n / "last/model.safetensors").read_bytes() for n in ("window", "old")]
    assert weights[0] != weights[1]
    path = tmp_path / "old/last/training_state.pt"
    state = torch.load(path, weights_only=True)
    saved = json.loads(state["config"])
    for section, names in {
        "training": ["bptt_window", "gradient_clip_value", "gradient_flow_every"],
        "decoder": ["recurrent_initialisation", "forget_bias"],
    }.items():
        for name in names:
            del saved[section][name]
    torch.save(state | {"config": json.dumps(saved)}, path)
    path.with_name("SHA256SUMS").unlink()
    train(load_config(experiment, settings[:1]), tmp_path / "old", resume=True)
    with pytest.raises(CheckpointError, match="bptt_window = 0"):
        train(load_config(experiment, settings), tmp_path / "old", resume=True)


def test_caption_loss_is_the_mean_over_true_tokens():
    logits, targets = torch.randn(7, 5), torch.randint(5, (7,))
    expected = torch.nn.functional.cross_entropy(logits, targets)
    positions = torch.stack([torch.arange(7) // 4, torch.zeros(7).long(), torch.arange(7) % 4], 1)
    output = DecoderOutput(logits, targets, positions, (2, 1, 4))
    torch.testing.assert_close(caption_loss(output, 0.0, 1.0, tokens=7, captions=2), expected)
    attention = torch.tensor([[0.5, 1.5], [2.0, 0.0]])
    output = replace(output, attention=attention)
    penalty = (0.25 + 0.25 + 1 + 1) / 4
    torch.testing.assert_close(
        caption_loss(output, 0.0, 2.0, tokens=7, captions=2), expected + 2 * penalty
    )


def test_learning_rate_schedule():
    config = TrainingConfig(warmup_steps=4, schedule="cosine")
    rates = [learning_rate_factor(step, 12, config) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    linear = replace(config, schedule="linear")
    assert learning_rate_factor(8, 12, linear) == pytest.approx(0.5)
    assert learning_rate_factor(11, 12, replace(config, schedule="constant")) == 1.0


def test_fine_tuning_trains_the_chosen_stages_alone(experiment, tmp_path):
    overrides = [
        "encoder.name=resnet18",
        "encoder.weights=none",
        "encoder.fine_tune_from=layer4",
        "encoder.learning_rate=1e-3",
        "training.epochs=1",
        "training.accumulation_steps=2",
    ]
    frozen = load_config(experiment, [*overrides, "training.learning_rate=1e-12"])
    train(replace(frozen, encoder=replace(frozen.encoder, learning_rate=1e-12)), tmp_path / "still")
    train(load_config(experiment, overrides), tmp_path / "run")
    before, after = weights_of(tmp_path / "still/last"), weights_of(tmp_path / "run/last")
    changed = {
        key.split(".")[2]
        for key in after
        if key.startswith("encoder.")
        and after[key].is_floating_point()
        and not torch.allclose(before[key], after[key], rtol=0, atol=1e-6)
    }
    assert changed == {"layer4"}
    assert len([line for line in read_log(tmp_path / "run") if line["kind"] == "step"]) == 3


def test_bad_images_are_refused_or_left_out(experiment, tmp_path):
    broken = tmp_path / "images" / "002.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(Exception, match=r"1 of 24 images can't be read: .*002\.png"):
        train(load_config(experiment), tmp_path / "run")
    skipping = ["data.bad_images=skip", "training.epochs=1"]
    train(load_config(experiment, skipping), tmp_path / "run")
    assert len(json.loads((tmp_path / "run/split.json").read_text())["train"]) == 23
    trained = [*skipping, "encoder.fine_tune_from=all"]
    train(load_config(experiment, trained), tmp_path / "tuned")
    assert len(json.loads((tmp_path / "tuned/split.json").read_text())["train"]) == 23
    broken.unlink()
    with pytest.raises(DataError, match=r"1 of 24 images are not in .*ids 2"):
        train(load_config(experiment), tmp_path / "other")


def test_overlapping_splits_are_refused(experiment, tmp_path):
    config = load_config(experiment, ["data.val_annotations=train.json"])
    with pytest.raises(DataError, match="24 of its images"):
        train(config, tmp_path / "run")


def test_vocabulary_comes_from_training_captions_alone(experiment, tmp_path):
    val = json.loads((tmp_path / "val.json").read_text())
    val["annotations"][0]["caption"] = "an unheard word"
    (tmp_path / "val.json").write_text(json.dumps(val))
    train(load_config(experiment, ["training.epochs=1"]), tmp_path / "run")
    words = json.loads((tmp_path / "run/best/vocabulary.json").read_text())
    assert "plain" in words
    assert "unheard" not in words


def test_sweep_runs_as_the_agent_runs_it(experiment, tmp_path, monkeypatch):
    """Build the command with W&B's own code, as its agent does, and run it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "experiments/sweep.yaml").read_text())
    chosen = {
        name: setting["values"][0] if "values" in setting else setting["min"]
        for name, setting in sweep["parameters"].items()
    }
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    args = create_sweep_command_args({"args": {k: {"value": v} for k, v in chosen.items()}})
    words = []
    for word in create_sweep_command(sweep["command"]):
        words += args["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
    assert words[-2:] == ["--output-dir", "runs/sweep-abc123"]
    words = [word for word in words if word != "${env}"]
    words[words.index("python")] = sys.executable
    words[words.index("${program}")] = str(ROOT / sweep["program"])
    words[words.index("experiments/flickr8k_attention.toml")] = str(experiment)
    words[words.index("runs/sweep-abc123")] = str(tmp_path / "sweep")
    small = ["decoder.hidden_size=16", "training.epochs=1"]
    subprocess.run([*words, *small], check=True, capture_output=True, cwd=tmp_path)
    run = json.loads((tmp_path / "sweep/run.json").read_text())
    assert run["config"]["decoder"]["dropout"] == chosen["decoder.dropout"]
    metric = sweep["metric"]["name"]
    assert metric.removeprefix("validation/") in read_log(tmp_path / "sweep")[-1]
