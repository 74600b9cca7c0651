"""What training minimises."""

import torch
from torch import Tensor, nn

from captioner.models.decoder import DecoderOutput


def caption_loss(
    output: DecoderOutput,
    smoothing: float,
    regularisation: float,
    tokens: int,
    captions: int,
    taught: Tensor | None = None,
    taught_share: float = 0.0,
) -> Tensor:
    """Return cross-entropy plus the doubly stochastic term, as a batch's part of a step.

    Divided by the tokens and captions of the whole optimiser step, the losses of accumulated
    batches add up to that of one large batch.

    Args:
        output: What the decoder gave under teacher forcing.
        smoothing: Label smoothing.
        regularisation: Weight of the doubly stochastic term (Xu et al. 2015, eq. 14), here a mean
            over the regions: each should get about as much attention as any other over a caption.
        tokens: Tokens in the optimiser step, PAD not counted.
        captions: Captions in the optimiser step.
        taught: What teachers hold likely, (tokens, V): see ``distillation``; None without any.
        taught_share: Share of the cross-entropy that is with these, in place of people's words.
    """
    logits = output.logits.float()
    loss = nn.functional.cross_entropy(
        logits, output.targets, label_smoothing=smoothing, reduction="sum"
    )
    if taught is not None:
        from_teachers = -(taught * torch.log_softmax(logits, -1)).sum()
        loss = (1 - taught_share) * loss + taught_share * from_teachers
    loss = loss / tokens
    if output.attention is not None and regularisation:
        unevenness = (1 - output.attention).square().mean(1).sum() / captions
        loss = loss + regularisation * unevenness
    return loss
