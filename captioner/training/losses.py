"""What training minimises."""

from torch import Tensor, nn

from captioner.models.decoder import DecoderOutput


def caption_loss(
    output: DecoderOutput, smoothing: float, regularisation: float, tokens: int, captions: int
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
    """
    loss = nn.functional.cross_entropy(
        output.logits.float(), output.targets, label_smoothing=smoothing, reduction="sum"
    )
    loss = loss / tokens
    if output.attention is not None and regularisation:
        unevenness = (1 - output.attention).square().mean(1).sum() / captions
        loss = loss + regularisation * unevenness
    return loss
