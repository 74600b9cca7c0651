"""What an image lets expect of its captions: n-grams, from the CNN's features.

The expectation is linear in the mean of the features over the regions: a regression of low rank,
fitted by ``training.consensus``. ``search.consensus`` ranks captions by it.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from captioner.errors import CheckpointError
from captioner.search.consensus import ORDERS, Ngrams

MOST_NGRAMS = 1_000_000


@dataclass(frozen=True, eq=False)
class Consensus:
    """Expects n-grams of an image's captions.

    Attributes:
        ngrams: The G n-grams.
        inner: (D, R).
        outer: (G, R).
        bias: (G,).
    """

    ngrams: Ngrams
    inner: Tensor
    outer: Tensor
    bias: Tensor

    def to(self, device: torch.device) -> "Consensus":
        """Return the same on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("inner", "outer", "bias")}
        return replace(self, **parts)

    def expected(self, features: Tensor) -> Tensor:
        """Return what is expected of images, (B, G), in float32.

        Args:
            features: (B, N, D).
        """
        inner = features.float().mean(1) @ self.inner
        return torch.nn.functional.linear(inner, self.outer, self.bias)

    @classmethod
    def rounded(cls, ngrams: Ngrams, inner: Tensor, outer: Tensor, bias: Tensor) -> "Consensus":
        """Return one whose matrices are what ``tensors`` keeps of them.

        Args:
            ngrams: The G n-grams.
            inner: (D, R).
            outer: (G, R).
            bias: (G,).
        """
        return cls.of_tensors(cls(ngrams, inner.half().float(), outer, bias.float()).tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: ``outer`` in whole numbers with a scale for each row."""
        scale = (self.outer.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12).float()
        return {
            "ngrams": torch.from_numpy(self.ngrams.token_ids.astype(np.int32)),
            "rarity": torch.from_numpy(self.ngrams.rarity.astype(np.float32)),
            "unseen": torch.tensor([self.ngrams.unseen], dtype=torch.float32),
            "inner": self.inner.half().contiguous(),
            "outer": (self.outer / scale).round().to(torch.int8).contiguous(),
            "scale": scale,
            "bias": self.bias.float().contiguous(),
        }

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "Consensus":
        """Return what ``tensors`` gave.

        Raises:
            CheckpointError: It is something else.
        """
        count, rank = tensors["outer"].shape if "outer" in tensors else (0, 0)
        width = len(tensors.get("inner", ()))
        expected = {
            "ngrams": ((count, ORDERS), torch.int32),
            "rarity": ((count,), torch.float32),
            "unseen": ((1,), torch.float32),
            "inner": ((width, rank), torch.float16),
            "outer": ((count, rank), torch.int8),
            "scale": ((count, 1), torch.float32),
            "bias": ((count,), torch.float32),
        }
        found = {name: (tuple(part.shape), part.dtype) for name, part in tensors.items()}
        if found != expected or not 0 < count <= MOST_NGRAMS:
            raise CheckpointError("not what an image lets expect of its captions")
        if not all(part.isfinite().all() for part in tensors.values()):
            raise CheckpointError("it holds numbers that aren't finite")
        ngrams = Ngrams(
            tensors["ngrams"].numpy(), tensors["rarity"].numpy(), tensors["unseen"].item()
        )
        outer = tensors["outer"].float() * tensors["scale"]
        return cls(ngrams, tensors["inner"].float(), outer, tensors["bias"])
