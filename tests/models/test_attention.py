"""Additive attention: its gradient made in chunks, its heads, its sentinel."""

from itertools import product

import pytest
import torch
from torch.nn.functional import linear

from captioner.errors import ConfigError
from captioner.models import attention as attention_module
from captioner.models.attention import AdditiveAttention, attend
from captioner.models.inference_decoder import _PowerAttention

B, K, N, D, H, A = 3, 2, 5, 6, 4, 7


def make(heads: int = 1, dtype: torch.dtype = torch.float64) -> AdditiveAttention:
    torch.manual_seed(heads)
    return AdditiveAttention(D, H, A, heads).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(9)
    shapes = ((B, N, D), (B, K, H), (B, K, A))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("chunk", [1, K * N * A * 2, 1 << 18], ids=["1", "2", "all"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("scales", [(1, 1), (1, 300), (300, 1), (30, 30), (300, 300)], ids=str)
def test_chunks_and_powers_change_neither_scores_nor_gradients(monkeypatch, scales, heads, chunk):
    """Against the plain form, which autograd differentiates; keys near and far, queries too."""
    monkeypatch.setattr(attention_module, "TRAINING_CHUNK", chunk)
    layer = make(heads)
    with torch.no_grad():
        layer.key.weight.mul_(scales[0])
        layer.query.weight.mul_(scales[1])
    features, hidden, _ = inputs()
    wanted = [features, hidden, *layer.parameters()]
    context, weights, _ = layer(hidden, layer.prepare(features))

    keys, query = layer.key(features), layer.query(hidden)
    scores = linear(torch.tanh(keys.unsqueeze(1) + query.unsqueeze(2)), layer.score.weight)
    plain_context, plain_weights, _ = attend(scores, features)
    torch.testing.assert_close(context, plain_context, rtol=0, atol=1e-13)
    torch.testing.assert_close(weights, plain_weights, rtol=0, atol=1e-13)

    def gradients(context, weights):
        total = context.square().sum() + (weights * torch.arange(N)).square().sum()
        return torch.autograd.grad(total, wanted)

    for one, other in zip(
        gradients(context, weights), gradients(plain_context, plain_weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_with_a_sentinel_equal_finite_differences(heads):
    layer = make(heads)

    def run(features, hidden, sentinel_key, *_):
        return layer(hidden, layer.prepare(features), sentinel_key)

    assert torch.autograd.gradcheck(run, (*inputs(), *layer.parameters()))


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("power", [False, True], ids=["training", "search"])
def test_heads_and_sentinel_by_hand(heads, power):
    """Each head has its scores and its share of the context, and of the sentinel's weight."""
    layer = make(heads)
    features, hidden, sentinel_key = (part.detach() for part in inputs())
    used = _PowerAttention(layer, torch.float64) if power else layer
    context, weights, beta = used(hidden, used.prepare(features), sentinel_key)
    share = D // heads
    for b, k in product(range(B), range(K)):
        query, mean = layer.query.weight @ hidden[b, k], torch.zeros(N, dtype=torch.float64)
        for head in range(heads):
            v = layer.score.weight[head]
            keys = [layer.key.weight @ a + layer.key.bias for a in features[b]]
            scores = torch.stack([v @ torch.tanh(key + query) for key in keys])
            alpha = torch.softmax(scores, 0)
            part = slice(head * share, (head + 1) * share)
            expected = sum(alpha[i] * features[b, i, part] for i in range(N))
            torch.testing.assert_close(context[b, k, part], expected, rtol=0, atol=1e-12)
            sentinel = v @ torch.tanh(sentinel_key[b, k] + query)
            whole = torch.softmax(torch.cat([scores, sentinel.view(1)]), 0)
            torch.testing.assert_close(
                beta[b, k, part], whole[-1].expand(share), rtol=0, atol=1e-12
            )
            mean = mean + alpha / heads
        torch.testing.assert_close(weights[b, k], mean, rtol=0, atol=1e-12)


def test_bfloat16_takes_tanh_in_float32_on_a_cpu():
    layer = make(dtype=torch.float32)
    features, hidden, _ = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        memory = layer.prepare(features)
        context, weights, _ = layer(hidden, memory)
    assert [part.dtype for part in memory] == [torch.bfloat16, torch.float32, torch.float32]
    assert (context.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):  # backward under autocast, as some have it
        context.float().sum().backward()
    exact = make(dtype=torch.float32)
    expected, _, _ = exact(hidden, exact.prepare(features))
    expected.sum().backward()
    torch.testing.assert_close(context.float(), expected, rtol=0.05, atol=0.05)
    for one, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad, other.grad, rtol=0.1, atol=0.1)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match=r"^decoder.attention_heads: a divisor of the regions' "):
        make(4)
