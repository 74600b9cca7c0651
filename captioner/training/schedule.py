"""The optimiser and its learning rates."""

import math

import torch

from captioner.config import Config, TrainingConfig
from captioner.models.captioning_model import CaptioningModel


def make_optimizer(model: CaptioningModel, config: Config) -> torch.optim.Optimizer:
    """Return AdamW; weight decay on matrices alone, the CNN's trained stages at their own rate."""
    groups = []
    for part, rate in (
        (model.decoder, config.training.learning_rate),
        (model.encoder, config.encoder.learning_rate),
    ):
        trained = [p for p in part.parameters() if p.requires_grad]
        for decayed in (True, False):
            groups.append(
                {
                    "params": [p for p in trained if (p.dim() > 1) == decayed],
                    "weight_decay": config.training.weight_decay if decayed else 0.0,
                    "peak": rate,
                }
            )
    fused = model.device.type in ("cpu", "cuda")  # one pass over the weights, not one an operation
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=fused)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's learning rate to its peak times ``factor``; return the first one's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return optimizer.param_groups[0]["lr"]


def learning_rate_factor(step: int, total: int, config: TrainingConfig) -> float:
    """Return the factor of the peak learning rate at an optimiser step, counted from 0.

    Args:
        step: The optimiser step.
        total: Optimiser steps in the whole run.
        config: Warm-up and schedule.
    """
    warmup = min(config.warmup_steps, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0
