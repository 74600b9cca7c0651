"""Keras' weights give Keras' outputs: against its equations, and against Keras where it is."""

import numpy as np
import pytest
import torch

from experiments.recurrence.keras_weights import KERAS, from_keras

D, H, T = 3, 4, 5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def keras_weights(cell, random):
    gates = len(KERAS[cell][1])
    bias = (2, gates * H) if cell == "gru" else (gates * H,)
    return [
        random.normal(size=size).astype(np.float32)
        for size in ((D, gates * H), (H, gates * H), bias)
    ]


def simple_rnn(x, kernel, recurrent, bias):
    h = np.zeros(H)
    for x_t in x:
        h = np.tanh(x_t @ kernel + h @ recurrent + bias)
        yield h


def lstm(x, kernel, recurrent, bias):
    """In Keras the gates lie as input, forget, candidate, output."""
    h, c = np.zeros(H), np.zeros(H)
    for x_t in x:
        i, f, g, o = np.split(x_t @ kernel + h @ recurrent + bias, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        yield h


def gru(x, kernel, recurrent, bias):
    """In Keras the gates lie as update, reset, candidate; reset_after=True, its default."""
    h = np.zeros(H)
    for x_t in x:
        x_z, x_r, x_h = np.split(x_t @ kernel + bias[0], 3)
        h_z, h_r, h_h = np.split(h @ recurrent + bias[1], 3)
        z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
        h = z * h + (1 - z) * np.tanh(x_h + r * h_h)
        yield h


EQUATIONS = {"rnn_tanh": simple_rnn, "lstm": lstm, "gru": gru}


@pytest.mark.parametrize("cell", KERAS)
def test_as_keras_equations(cell):
    random = np.random.default_rng(0)
    weights, x = keras_weights(cell, random), random.normal(size=(2, T, D)).astype(np.float32)
    outputs = from_keras(cell, weights, return_sequences=True)(torch.from_numpy(x))
    expected = [list(EQUATIONS[cell](row, *weights)) for row in x]
    np.testing.assert_allclose(outputs.detach().numpy(), expected, atol=1e-5)
    last, state = from_keras(cell, weights, return_state=True)(torch.from_numpy(x))
    np.testing.assert_allclose(last.detach().numpy(), np.array(expected)[:, -1], atol=1e-5)
    assert len(state) == (2 if cell == "lstm" else 1)


@pytest.mark.parametrize("cell", KERAS)
def test_as_keras_itself(cell, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="needs Keras: pip install keras")
    layer = getattr(keras.layers, KERAS[cell][0])(H, return_sequences=True)
    random = np.random.default_rng(1)
    x = random.normal(size=(2, T, D)).astype(np.float32)
    layer(x)
    layer.set_weights(keras_weights(cell, random))
    outputs = from_keras(cell, layer.get_weights(), return_sequences=True)(torch.from_numpy(x))
    expected = keras.ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(outputs.detach().numpy(), expected, atol=1e-5)


def test_what_torch_has_no_cell_for_is_refused():
    random = np.random.default_rng(0)
    kernel, recurrent, bias = keras_weights("gru", random)
    with pytest.raises(ValueError, match="reset_after=True was expected"):
        from_keras("gru", [kernel, recurrent, bias[0]])
    with pytest.raises(ValueError, match="bias were expected, found 2"):
        from_keras("lstm", keras_weights("lstm", random)[:2])
