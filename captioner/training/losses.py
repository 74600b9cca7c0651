"""What training minimises."""

import torch
from torch import Tensor, nn

from captioner.data.vocabulary import SPECIAL_WORDS
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


def attribute_loss(logits: Tensor, output: DecoderOutput, images: int) -> Tensor:
    """Return the cross-entropy of predicted words, as a batch's part of a step.

    A word is there if any of the image's captions in the batch has it. Summed over the words, for
    each of which it is a yes or no, and divided by the images of the whole optimiser step.

    Args:
        logits: The output's ``attributes``, (B, W).
        output: What the decoder gave under teacher forcing.
        images: Images in the optimiser step.
    """
    has_word = logits.new_zeros((len(logits), output.logits.shape[1]), dtype=torch.float32)
    has_word[output.positions[:, 0], output.targets] = 1.0
    wanted = has_word[:, len(SPECIAL_WORDS) :][:, : logits.shape[1]]
    loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="sum")
    return loss / images
