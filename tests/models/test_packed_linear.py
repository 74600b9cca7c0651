import pytest
import torch
from torch import nn

from captioner.device import computes_bfloat16
from captioner.models.packed_linear import PackedLinear, round_rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    if request.param == torch.bfloat16 and not computes_bfloat16(torch.device("cpu")):
        pytest.skip("needs a processor with instructions for bfloat16")
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 4, 7), (0, 7), (300, 7)])
def test_it_is_a_linear_layer(dtype, bias, shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 11, bias=bias), torch.randn(shape)
    packed = PackedLinear.from_layer(layer, dtype)
    exact = layer.double()(x.to(dtype).double())
    said = packed(x.to(dtype))
    assert said.dtype == dtype
    assert said.shape == (*shape[:-1], 11)
    torch.testing.assert_close(said.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * 7)


def test_rows_that_lie_apart(dtype):
    wide = torch.randn(5, 3, 20).to(dtype)
    packed = PackedLinear(torch.randn(6, 8), None, dtype)
    assert torch.equal(packed(wide[..., 4:12]), packed(wide[..., 4:12].contiguous()))


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_in_any_batch(narrow):
    packed = PackedLinear(torch.randn(500, 300), torch.randn(500), narrow)
    if not packed._is_packed:
        pytest.skip("needs a torch that multiplies with oneDNN")
    x = torch.randn(260, 300).to(narrow)
    whole = packed(x)
    for rows in (1, 2, 3, 17, 64, 255):
        assert torch.equal(packed(x[:rows]), whole[:rows])


def test_it_does_not_follow_the_layer_it_was_made_of():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    for dtype in (torch.float32, torch.float64):
        packed = PackedLinear.from_layer(layer, dtype)
        before = packed(x.to(dtype)).clone()
        with torch.no_grad():
            layer.weight.add_(1)
        assert torch.equal(packed(x.to(dtype)), before)


def test_few_sizes_are_computed():
    sizes = [round_rows(count) for count in range(4097)]
    assert all(count <= size <= 1.125 * count for count, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 8 * 12
    assert [round_rows(size) for size in sizes] == sizes
