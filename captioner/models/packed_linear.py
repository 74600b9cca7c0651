"""Linear layers for inference, their weights laid out the way the processor multiplies fastest."""

import torch
from torch import Tensor, nn

from captioner.device import computes_bfloat16

PACKED_ROWS = 256  # for how many rows at a time oneDNN lays weights out; any number may come


def round_rows(count: int) -> int:
    """Return the number of rows, that many or a few more, that a packed product is computed for.

    oneDNN writes a program for every number of rows it meets, in half a millisecond and half a
    megabyte, and keeps it. So there are 8 sizes from one power of two to the next.
    """
    step = max(1, 1 << (count - 1).bit_length() >> 4)
    return -(-count // step) * step


class PackedLinear(nn.Module):
    """x W^T + b without gradient, as ``torch.nn.functional.linear``; it has no parameters.

    On a CPU it is oneDNN's product, with weights laid out once, as torch.compile has it. torch's
    own takes MKL's for float32, which leaves half of what some processors can do unused, and
    whose result for a row depends on how many rows come with it.

    Args:
        weight: W, (out, in).
        bias: b, (out,), or None.
        dtype: In which it computes; x must have it. Weights are copied into it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._weight = weight.detach().to(dtype)
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._is_packed = _can_pack(self._weight)
        if self._is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACKED_ROWS)

    @classmethod
    def from_layer(cls, layer: nn.Linear, dtype: torch.dtype) -> "PackedLinear":
        """Return that of a layer."""
        return cls(layer.weight, layer.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) for x (…, in)."""
        if not self._is_packed:
            return nn.functional.linear(x, self._weight, self._bias)
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        if missing := round_rows(count) - count:
            rows = nn.functional.pad(rows, (0, 0, 0, missing))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, "none", [], ""
        )
        return product[:count].view(*x.shape[:-1], product.shape[-1])


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and computes_bfloat16(weight.device)
    )
