"""The hypotheses of a search as tensors, and the captions that it has finished.

Shape letters: B images that are still searched, K places for hypotheses of each, t tokens so far,
C forced phrases, V words.
"""

import torch
from torch import Tensor

from captioner.config import SearchConfig
from captioner.data.vocabulary import EOS, PAD
from captioner.search.constraints import CompiledConstraints
from captioner.search.selection import Selection


class Beams:
    """The hypotheses of the images for which better captions may still be found.

    It begins with one empty hypothesis for each image.

    Args:
        image_keys: A number for each image, (B,), on the device of the search.
        settings: How to search.
        constraints: What captions may and must contain.
        dtype: Of the logits.

    Attributes:
        constraints: As given.
        image_rows: Which image of the search each row is, (B,).
        image_keys: The numbers of these images, (B,).
        token_ids: (B, K, t); PAD after EOS.
        log_probs: (B, K); -inf marks an empty place. NaN, once there, stays: it counts as larger
            than all numbers.
        finished: Which hypotheses took EOS, (B, K).
        phrase_states: How much of the forced phrases they contain, (B, K, C).
        results: The captions of the images that are finished.
    """

    def __init__(
        self,
        image_keys: Tensor,
        settings: SearchConfig,
        constraints: CompiledConstraints,
        dtype: torch.dtype,
    ) -> None:
        images, device, dtype = len(image_keys), image_keys.device, _precise(dtype)
        self.constraints, self._settings = constraints, settings
        self.image_rows = torch.arange(images, device=device)
        self.image_keys = image_keys
        self.token_ids = torch.empty((images, 1, 0), dtype=torch.long, device=device)
        self.log_probs = torch.zeros((images, 1), dtype=dtype, device=device)
        self.finished = torch.zeros((images, 1), dtype=torch.bool, device=device)
        self.phrase_states = constraints.init_state(images)
        self.results = Results(images, settings, dtype, device)

    def __len__(self) -> int:
        """Return the number of images that are still searched."""
        return len(self.image_rows)

    @property
    def length(self) -> int:
        """How many tokens the hypotheses have: t."""
        return self.token_ids.shape[2]

    @property
    def last_tokens(self) -> Tensor:
        """The tokens to go on from, (B, K)."""
        return self.token_ids[..., -1]

    def extend(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities of all hypotheses with one token more.

        Args:
            logits: Of the next tokens, (B, K, V).

        Returns:
            (B, K, V), -inf for what is forbidden. A finished hypothesis can only stay as it is:
            it has inf at PAD, to be selected before all others.
        """
        log_probs = log_softmax(logits)
        log_probs += self.log_probs.masked_fill(self.finished, -torch.inf).unsqueeze(2)
        self.constraints.forbid(log_probs, self.token_ids, self.phrase_states)
        log_probs[..., PAD].masked_fill_(self.finished, torch.inf)
        return log_probs

    def advance(self, selection: Selection) -> Tensor:
        """Replace the hypotheses by those selected of the extended ones.

        Returns:
            The place that each comes from, (B, K').
        """
        selected, words = selection.log_probs, self.constraints.vocabulary_size
        origin, next_tokens = selection.indices // words, selection.indices % words
        stays = selected == torch.inf
        log_probs, token_ids, phrase_states = gather_beams(
            (self.log_probs, self.token_ids, self.phrase_states), origin
        )
        self.log_probs = torch.where(stays, log_probs, selected)
        self.finished = stays | ((next_tokens == EOS) & (selected > -torch.inf))
        self.token_ids = torch.cat([token_ids, next_tokens.unsqueeze(2)], 2)
        self.phrase_states = self.constraints.advance(phrase_states, next_tokens)
        return origin

    def drop_finished(self) -> Tensor | None:
        """Move the images that no better caption can be found for to the results.

        Returns:
            The rows that stay active, (B',), or None if all do.
        """
        image_finished = self._image_finished()
        # The only place in a step that waits for the device.
        num_active = len(self) - int(image_finished.sum())
        if num_active == len(self):
            return None
        rows = torch.argsort(image_finished, stable=True)
        active = rows[:num_active]
        self._store_results(rows[num_active:])
        self.image_rows, self.image_keys = self.image_rows[active], self.image_keys[active]
        self.token_ids, self.log_probs = self.token_ids[active], self.log_probs[active]
        self.finished = self.finished[active]
        self.phrase_states = self.phrase_states[active]
        return active

    def finish_all(self, logits: Tensor) -> None:
        """Let all hypotheses take EOS, and move all images to the results.

        Args:
            logits: Of the next tokens, (B, K, V), after captions of ``max_length`` words.
        """
        log_probs = self.log_probs
        with_eos = log_probs + log_softmax(logits)[..., EOS]
        if self.constraints.forced is not None:
            unmet = self.constraints.forced.is_unmet(self.phrase_states)
            log_probs = log_probs.masked_fill(unmet, -torch.inf)
            with_eos = with_eos.masked_fill(unmet, -torch.inf)
        ending = ~self.finished & (with_eos != -torch.inf)  # NaN goes through, to be reported
        self.log_probs = torch.where(ending, with_eos, log_probs)
        self.token_ids = torch.nn.functional.pad(self.token_ids, (0, 1), value=PAD)
        self.token_ids[..., -1].masked_fill_(ending, EOS)
        self.finished = self.finished | ending
        self._store_results(torch.arange(len(self), device=logits.device))

    def _image_finished(self) -> Tensor:
        """Tell for which images no better captions can be found, (B,)."""
        settings = self._settings
        active = ~self.finished & (self.log_probs != -torch.inf)
        if settings.samples:
            return ~active.any(1)
        wanted = -(-settings.n_best // settings.groups)  # in each group
        scores = self._scores().masked_fill(~self.finished, -torch.inf)
        scores = scores.unflatten(1, (settings.groups, -1))
        worst_wanted = scores.topk(min(wanted, scores.shape[2])).values[..., -1]  # (B, groups)
        # Log-probabilities only fall, and cost least when divided by the greatest length.
        reachable = self.log_probs / (settings.max_length + 1) ** settings.length_penalty
        reachable = reachable.masked_fill(~active, -torch.inf)
        reachable = reachable.unflatten(1, (settings.groups, -1)).amax(2)
        return (reachable <= worst_wanted).all(1) | ~active.any(1)

    def _scores(self) -> Tensor:
        """Return what hypotheses are ranked by, (B, K)."""
        lengths = (self.token_ids != PAD).sum(2).clamp(min=1)
        return self.log_probs / lengths**self._settings.length_penalty

    def _store_results(self, rows: Tensor) -> None:
        """Move the best hypotheses of these rows to the results."""
        finished = self.finished[rows]
        groups = 1 if self._settings.samples else self._settings.groups
        order = _rank(self._scores()[rows], finished, groups)[:, : self._settings.n_best]
        best = gather_beams((self.token_ids[rows], self.log_probs[rows], finished), order)
        self.results.store(self.image_rows[rows], *best)


class Results:
    """The best captions of each image, on the device, to be read once at the end.

    Args:
        images: Number of images.
        settings: How many captions of each are wanted, and how long they can be.
        dtype: Of log-probabilities.
        device: Where the search runs.

    Attributes:
        token_ids: Best first, (images, n_best, max_length + 1); PAD after EOS.
        log_probs: (images, n_best); -inf where there is no caption.
        finished: Which captions end with EOS, (images, n_best).
    """

    def __init__(
        self, images: int, settings: SearchConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (images, settings.n_best)
        self.token_ids = torch.full((*shape, settings.max_length + 1), PAD, device=device)
        self.log_probs = torch.full(shape, -torch.inf, dtype=dtype, device=device)
        self.finished = torch.zeros(shape, dtype=torch.bool, device=device)

    def store(
        self, image_rows: Tensor, token_ids: Tensor, log_probs: Tensor, finished: Tensor
    ) -> None:
        """Write the captions of some images, best first: (B, K, t), (B, K) and (B, K)."""
        images = image_rows.unsqueeze(1)
        places = torch.arange(token_ids.shape[1], device=token_ids.device)
        self.token_ids[images, places, : token_ids.shape[2]] = token_ids
        self.log_probs[images, places] = log_probs
        self.finished[images, places] = finished


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities over the last axis: float32, or float64 if the logits are."""
    precise = _precise(logits.dtype)
    if logits.dtype == precise or logits.device.type != "cpu":
        return torch.log_softmax(logits, -1, dtype=precise)
    log_probs = logits.to(precise)
    # In place: two tensors of this size would leave the processor's caches.
    torch.log_softmax(log_probs, -1, out=log_probs)
    return log_probs


def gather_beams(
    tensors: tuple[Tensor, ...], origin: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Collect what belongs to hypotheses from the places that they come from.

    Args:
        tensors: (B, K, …) each.
        origin: The places, (B, K').
        rows: The images that are wanted, (B',); None takes all.

    Returns:
        (B', K', …) for each tensor.
    """
    if not tensors:
        return ()
    if rows is None:
        rows = torch.arange(len(origin), device=origin.device)
    else:
        origin = origin[rows]
    indices = (rows.unsqueeze(1) * tensors[0].shape[1] + origin).flatten()
    return tuple(
        tensor.flatten(0, 1).index_select(0, indices).unflatten(0, origin.shape)
        for tensor in tensors
    )


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rank(scores: Tensor, finished: Tensor, groups: int) -> Tensor:
    """Return the places of hypotheses in order, (B, K).

    First come those that finished, then those that were cut off, each by score. With several
    groups, the best of each group come first, then the second of each, and so on.
    """
    order = _order(scores, finished)
    if groups == 1:
        return order
    width = scores.shape[1] // groups
    order_in_groups = _order(scores.view(-1, width), finished.view(-1, width))
    ranks = torch.arange(width, device=order.device).expand_as(order_in_groups)
    rank_in_group = torch.empty_like(order)
    rank_in_group.view(-1, width).scatter_(1, order_in_groups, ranks)
    return order.gather(1, rank_in_group.gather(1, order).argsort(dim=1, stable=True))


def _order(scores: Tensor, finished: Tensor) -> Tensor:
    """Return places in order: finished hypotheses before the others, then by score."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return order.gather(1, torch.argsort(~finished.gather(1, order), dim=1, stable=True))
