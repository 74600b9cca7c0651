"""Self-critical sequence training: captions are sampled, and the better ones made likelier.

Rennie et al. 2017 (arXiv 1612.00563): the gradient of the expected reward is that of
-(r - b) log p(sample), where the baseline b is what the model reaches without this sample: the mean
reward of the other samples of the same image (Luo 2020, arXiv 2003.09971), or that of the greedy
caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from captioner.config import SearchConfig
from captioner.data.dataset import pad
from captioner.data.vocabulary import Vocabulary
from captioner.metrics.reward import CaptionReward
from captioner.models.captioning_model import generate
from captioner.models.decoder import DecoderOutput
from captioner.models.inference_decoder import InferenceDecoder
from captioner.search.hypothesis import Hypothesis

Baseline = Literal["mean", "greedy"]


@dataclass(frozen=True)
class Samples:
    """Sampled captions of a batch of images.

    Attributes:
        order: Which image of the batch each row is, (B,): the longest captions come first, of the
            images and of each image, as teacher forcing is fastest with.
        token_ids: From BOS to EOS, then PAD, (B, K, T + 1).
        advantages: Reward less baseline of each, (B, K).
        reward: Mean over all of them.
        baseline: Mean over all of them.
    """

    order: Tensor
    token_ids: Tensor
    advantages: Tensor
    reward: float
    baseline: float


def sample_captions(
    decoder: InferenceDecoder,
    features: Tensor,
    vocabulary: Vocabulary,
    reward: CaptionReward,
    images: Sequence[int],
    count: int,
    max_length: int,
    seed: int,
    baseline: Baseline = "mean",
) -> Samples:
    """Sample captions and score them.

    Args:
        decoder: The decoder as it is now.
        features: (B, N, D).
        vocabulary: The decoder's words.
        reward: What is to be maximised.
        images: Which images these are, by their place among the reward's references.
        count: K, samples of each image; at least 2 for the mean as the baseline.
        max_length: Most words in a caption.
        seed: What is drawn depends on it and on ``images`` alone, not on the batch.
        baseline: "mean" of the image's other samples, or the "greedy" caption's reward.
    """
    keys = torch.tensor(images)
    sampling = SearchConfig(samples=count, n_best=count, max_length=max_length, seed=seed)
    captions = _token_ids(generate([decoder], [features], sampling, vocabulary, keys))
    token_ids = pad(captions)
    places = np.asarray(images)
    rewards = reward(places, token_ids[:, :, 1:].numpy())
    if baseline == "mean":
        baselines = (rewards.sum(1, keepdims=True) - rewards) / (count - 1)
    else:
        greedy = SearchConfig(beam_size=1, max_length=max_length)
        best = generate([decoder], [features], greedy, vocabulary)
        baselines = reward(places, pad(_token_ids(best))[:, :, 1:].numpy())
    order = torch.tensor([len(of_image[0]) for of_image in captions]).argsort(descending=True)
    return Samples(
        order,
        token_ids[order],
        torch.from_numpy(rewards - baselines).float()[order],
        float(rewards.mean()),
        float(baselines.mean()),
    )


def _token_ids(hypotheses: Sequence[Sequence[Hypothesis]]) -> list[list[list[int]]]:
    """Return the words of captions, the longest of each image first."""
    captions = [[hypothesis.token_ids for hypothesis in of_image] for of_image in hypotheses]
    return [sorted(of_image, key=len, reverse=True) for of_image in captions]


def self_critical_loss(output: DecoderOutput, advantages: Tensor, images: int) -> Tensor:
    """Return the loss whose gradient is that of the expected reward, as a batch's part of a step.

    Args:
        output: Of the sampled captions under teacher forcing.
        advantages: Reward less baseline, (B, K).
        images: Images in the optimiser step.
    """
    log_probabilities = output.log_probabilities().sum(-1)  # (B, K)
    weighted = advantages.to(log_probabilities) * log_probabilities
    return -weighted.sum() / (images * advantages.shape[1])
