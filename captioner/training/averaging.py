"""A moving average of a model's weights (Polyak and Juditsky 1992)."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return an average of a model's weights, ``.module``; ``update_parameters`` takes new ones in.

    Args:
        model: Its weights as they are now count for nothing once it is updated.
        decay: How much of the average stays at an update; in the n-th at most (1 + n) / (10 + n),
            so that the first, random weights are soon forgotten.
    """

    @torch.no_grad()
    def update(average: Tensors, current: Tensors, count: Tensor | int) -> None:
        kept = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(average, current, 1 - kept)

    return AveragedModel(model, multi_avg_fn=update)
