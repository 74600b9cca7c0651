"""Dropout that costs little on a CPU."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout`` (Srivastava et al. 2014), on a CPU by 16 random bits for each number.

    torch's own draws a float64 for each there, which takes longer than what recurrent decoders
    compute with it. The share that is dropped is rounded to a multiple of 2^-16, and what is left
    is scaled by exactly that.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x, in training with a share ``p`` of its numbers 0 and the others scaled up."""
        cheap = x.device.type != "cpu" or torch.compiler.is_compiling()
        if not self.training or self.p == 0 or cheap:
            return super().forward(x)
        dropped = round(self.p * 2**16)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))
