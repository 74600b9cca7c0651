"""Dropout by random bits: it is torch's dropout, by other draws."""

import pytest
import torch
from torch import nn

from captioner.models.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_is_dropped_and_the_mean_is_kept(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 999, dtype=dtype)
    y = Dropout(p)(x)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert float((y == 0).double().mean()) == pytest.approx(p, abs=0.002)
    kept = y[y != 0].double()
    assert float(kept.max()) == float(kept.min()) == pytest.approx(1 / (1 - p), rel=0.005)
    # No pattern: rows, columns and neighbours are as independent draws would be.
    zeros = (y == 0).double()
    for means in (zeros.mean(0), zeros.mean(1)):
        assert float((means - p).abs().max()) < 0.08
    for shift in (1, 4):
        both = float((zeros[:, :-shift] * zeros[:, shift:]).mean())
        assert both == pytest.approx(p * p, abs=0.003)


def test_the_gradient_is_of_what_is_kept():
    x = torch.randn(7, 5, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_nothing_is_dropped_outside_training_or_at_0(share):
    x = torch.randn(100)
    dropout = Dropout(share)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(dropout.train()(x), x) == (share == 0)


def test_draws_follow_torchs_seed():
    x, dropout = torch.randn(3, 7), Dropout(0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(dropout(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_nothing_at_all_and_numbers_that_lie_apart():
    assert Dropout(0.5)(torch.empty(0, 4)).shape == (0, 4)
    x = torch.randn(6, 8).T
    y = Dropout(0.5)(x)
    assert y.shape == (8, 6)
    assert torch.equal(y[y != 0], 2 * x[y != 0])
    assert isinstance(Dropout(0.5), nn.Dropout)
