"""A small data set of plain colours and the experiment that trains on it."""

import pytest
import safetensors.torch
import torch
import torchvision
from training_runs import TrainingServer, make_experiment


@pytest.fixture(scope="session")
def cnn_weights(tmp_path_factory):
    """Weights of a small CNN: random, but a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet1_1.safetensors"
    safetensors.torch.save_file(torchvision.models.squeezenet1_1().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = TrainingServer(tmp_path_factory.mktemp("server") / "output.txt")
    yield server
    server.close()


@pytest.fixture
def experiment(tmp_path, cnn_weights):
    """The experiment file of a small data set: 24 training and 8 validation images."""
    return make_experiment(tmp_path, cnn_weights)
