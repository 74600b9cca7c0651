import torch

from captioner.models.checkpoint import load_checkpoint, save_checkpoint
from tools.average_checkpoints import main


def test_weights_are_averaged_and_others_refused(checkpoint, tmp_path, capsys):
    model = load_checkpoint(checkpoint)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    (tmp_path / "other").mkdir()
    save_checkpoint(model, tmp_path / "other", {})
    output = tmp_path / "new/averaged"
    words = [str(checkpoint), str(tmp_path / "other"), "--output", str(output)]
    assert main(words) == 0
    averaged = load_checkpoint(output)
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter.data, weights[name] + 0.25)
    assert main(words) == 2
    assert "it is there already" in capsys.readouterr().err
    assert main([str(checkpoint), "--output", str(tmp_path / "x")]) == 2

    model.vocabulary = type(model.vocabulary)([*model.vocabulary.words[:-1], "other"])
    save_checkpoint(model, tmp_path / "other", {})
    assert main([*words[:-1], str(tmp_path / "y")]) == 1
    assert "checkpoint 2 differs from the first in its vocabulary" in capsys.readouterr().err
