"""Scores of captions against references, equal to those of the official COCO evaluation.

``compute_metrics`` gives numbers for a corpus. Nothing here imports torch.
"""

from captioner.metrics.scores import compute_metrics

__all__ = ["compute_metrics"]
