"""Distillation: a model learns from the words that trained ones hold likely, beside people's.

Hinton et al. 2015 (arXiv 1503.02531), word by word as in Kim and Rush 2016 (arXiv 1606.07947): what
an ensemble knows goes into one model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from captioner.device import autocast
from captioner.errors import CheckpointError
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import load_checkpoint
from captioner.models.decoder import DecoderOutput
from captioner.models.inference_encoder import InferenceEncoder


class Teachers:
    """Trained models whose mean is learnt from; they stay as they are.

    Args:
        paths: Their checkpoints.
        model: What learns.
        precision: torch.bfloat16 or torch.float32, for matrix products.

    Raises:
        CheckpointError: One can't be read, or has other words, or takes another input than the
            model: pixels of the same preprocessing, or features of the same frozen CNN.
    """

    def __init__(
        self, paths: Sequence[str], model: CaptioningModel, precision: torch.dtype
    ) -> None:
        self.precision = precision
        self.models = [
            load_checkpoint(Path(path).expanduser(), model.device).requires_grad_(False)
            for path in paths
        ]
        for path, teacher in zip(paths, self.models, strict=True):
            if differing := _differing(teacher, model):
                raise CheckpointError(
                    f"distillation.teachers: {path}: {differing} the trained model's was expected"
                )
        self.encoders = [InferenceEncoder(teacher.encoder, precision) for teacher in self.models]

    @torch.no_grad()
    def probabilities(self, x: Tensor, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the mean of what the teachers hold likely, each word given people's before it.

        Args:
            x: What the model learns from: cached features (B, N, D), or pixels (B, 3, S, S).
            token_ids: People's captions, (B, K, T + 1).
            positions: Those of the model's ``DecoderOutput``, (tokens, 3).

        Returns:
            (tokens, V), float32.
        """
        likely = []
        for teacher, encoder in zip(self.models, self.encoders, strict=True):
            features = encoder(x) if x.dim() == 4 else teacher.features(x, self.precision)
            with autocast(teacher.device, self.precision):
                output = teacher.decoder.teacher_forcing(features, token_ids)
            rows = _rows_of(output, positions)
            likely.append(output.logits.softmax(-1, dtype=torch.float32)[rows])
        return torch.stack(likely).mean(0)


def _differing(teacher: CaptioningModel, model: CaptioningModel) -> str:
    """Say what differs, where a teacher can't be asked what the model is asked."""
    if teacher.vocabulary.words != model.vocabulary.words:
        return "its vocabulary is another;"
    if not model.encoder.frozen:
        same = teacher.encoder.preprocessing == model.encoder.preprocessing
        return "" if same else f"its preprocessing is {teacher.encoder.preprocessing};"
    if teacher.decoder.pooled != model.decoder.pooled:
        return f"it takes {'the mean' if teacher.decoder.pooled else 'all'} of the regions;"
    same = teacher.encoder.fingerprint() == model.encoder.fingerprint()
    return "" if same else "its CNN is another, and the features of this one are cached;"


def _rows_of(output: DecoderOutput, positions: Tensor) -> Tensor:
    """Return where an output has these positions, (tokens,): decoders order them differently."""
    row_by_position = positions.new_zeros(output.shape)
    rows = torch.arange(len(positions), device=positions.device)
    row_by_position[tuple(output.positions.unbind(1))] = rows
    return row_by_position[tuple(positions.unbind(1))]
