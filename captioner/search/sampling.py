"""Sampling of captions: nucleus and top-k, with random numbers that depend on no other image."""

import torch
from torch import Tensor

from captioner.config import SearchConfig
from captioner.search.selection import Selection


def sample_next(
    log_probs: Tensor, settings: SearchConfig, image_keys: Tensor, position: int
) -> Selection:
    """Draw the next token of each hypothesis, among the likeliest ``top_k`` and ``top_p``.

    Nucleus sampling: Holtzman et al., 2020. The tokens' probabilities are laid side by side on a
    line, the likeliest first; one random number picks a point on the line.

    Args:
        log_probs: Of the hypotheses with each next token, (B, K, V); see ``search.selection``.
        settings: How many samples, and how to draw them.
        image_keys: What the random numbers depend on, (B,).
        position: How many tokens the hypotheses have.
    """
    places, words = log_probs.shape[1:]
    tempered = (log_probs / settings.temperature).clamp(max=0.0)  # inf of finished hypotheses
    ordered, tokens = tempered.sort(dim=-1, descending=True, stable=True)
    if settings.top_k:
        ordered, tokens = ordered[..., : settings.top_k], tokens[..., : settings.top_k]
    probabilities = ordered.softmax(-1)
    ends = probabilities.cumsum(-1)
    in_nucleus = ends - probabilities < settings.top_p  # the first to pass top_p is the last in it
    total = ends.masked_fill(~in_nucleus, 0.0).amax(-1, keepdim=True)
    numbers = torch.arange(settings.samples, device=log_probs.device)
    point = uniform(settings.seed, image_keys, numbers, position).unsqueeze(2)
    passed = (ends <= point.to(ends.dtype) * total).sum(-1, keepdim=True)
    # Rounding must not move the point past the last token of the nucleus.
    rank = torch.minimum(passed, in_nucleus.sum(-1, keepdim=True) - 1).clamp(min=0)
    chosen = tokens.expand(-1, settings.samples, -1).gather(2, rank).squeeze(2)
    indices = chosen + words * numbers.clamp(max=places - 1)
    return Selection(log_probs.flatten(1).gather(1, indices), indices)


def uniform(seed: int, image_keys: Tensor, numbers: Tensor, position: int) -> Tensor:
    """Return a random number from 0 to 1 for each image and sample.

    It is a function of the arguments alone (the mixing function of SplitMix64: Steele, Lea and
    Flood, 2014), so that it is the same in any batch and on any device.

    Args:
        seed: Of the whole search.
        image_keys: One integer for each image, (B,).
        numbers: The numbers of the samples, (K,).
        position: Of the token in the caption.

    Returns:
        (B, K), float32, at least 0 and below 1.
    """
    mixed = torch.zeros_like(image_keys).unsqueeze(1)
    for part in (seed, image_keys.unsqueeze(1), numbers.unsqueeze(0), position):
        mixed = mixed + part + -0x61C8864680B583EB  # 64-bit arithmetic that wraps around
        mixed = (mixed ^ _shift_right(mixed, 30)) * -0x40A7B892E31B1A47
        mixed = (mixed ^ _shift_right(mixed, 27)) * -0x6B2FB644ECCEEE15
        mixed = mixed ^ _shift_right(mixed, 31)
    return _shift_right(mixed, 40).float() * 2.0**-24


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift 64-bit integers to the right, with zeros on the left."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
