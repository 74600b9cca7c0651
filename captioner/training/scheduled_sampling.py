"""Scheduled sampling: in training too, some of the words that are fed are the model's own.

Bengio et al. 2015 (arXiv 1506.03099), in the parallel form of Mihaylova and Martins 2019 (arXiv
1906.07651): people's captions are fed once, words are drawn from what is predicted, and a share of
them is fed in place of people's when the loss is computed. The targets stay people's words.
"""

import torch
from torch import Tensor

from captioner.data.vocabulary import BOS, EOS, PAD
from captioner.models.decoder import DecoderOutput


@torch.no_grad()
def mix_inputs(token_ids: Tensor, output: DecoderOutput, share: float) -> Tensor:
    """Return what is fed, (B, K, T): words of captions, a share of them replaced by drawn ones.

    Args:
        token_ids: People's captions, (B, K, T + 1), on the device of ``output``.
        output: What the decoder gave when it was fed them.
        share: How many of the words, 0 to 1; each by chance. BOS, which comes first, stays.
    """
    inputs = token_ids[..., :-1].clone()
    logits = output.logits.float()
    logits[:, [PAD, BOS, EOS]] = -torch.inf  # no words: nothing is said after them
    drawn = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    image, caption, step = output.positions.unbind(1)
    replaced = torch.rand(len(drawn), device=drawn.device) < share
    replaced &= output.targets != EOS
    inputs[image[replaced], caption[replaced], step[replaced] + 1] = drawn[replaced]
    return inputs
