"""Greedy, beam, diverse beam and constrained beam search, and sampling: one engine.

It is batched over images and hypotheses, over a plain step function: that takes the last tokens of
all hypotheses (B, K), their state (tensors of (B, K, …)) and the memory of their images (tensors of
(B, …)), and returns the logits of the next tokens (B, K, V) and the new state. Nothing here knows
what is behind it. What differs between the methods is how the next hypotheses are chosen
(``_choose_…``); everything else is shared.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.config import SearchConfig
from captioner.data.vocabulary import BOS, EOS, PAD
from captioner.errors import SearchError
from captioner.search.constraints import ForcedPhrases, Rules

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensors, Tensors], tuple[Tensor, Tensors]]


@dataclass(frozen=True)
class Hypothesis:
    """One caption that search found.

    Attributes:
        token_ids: Its words, without BOS and EOS.
        log_probability: The model's own, of the words, and of EOS if it ended; whatever the search
            preferred or forbade.
        ended: Whether EOS follows; False only where the model gives EOS no probability.
    """

    token_ids: list[int]
    log_probability: float
    ended: bool


@torch.inference_mode()
def decode(
    step: Step,
    state: Tensors,
    memory: Tensors,
    settings: SearchConfig,
    rules: Rules | None = None,
    keys: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Find captions for each image.

    A hypothesis that takes EOS while it is among the best keeps its place in the beam; the others
    go on in the places that are left. An image is done when all its places have ended, or when no
    unfinished hypothesis can overtake the best finished ones. After ``max_length`` words only EOS
    can follow. Hypotheses are ranked by log-probability / length ** ``length_penalty``, where the
    length counts EOS; those for which EOS was impossible come last. Which of two that score exactly
    alike comes first is fixed: the same each time, and in any batch.

    Args:
        step: See the top of this file.
        state: Of one hypothesis for each image, (B, 1, …).
        memory: Of the images, (B, …).
        settings: Which search, how wide, and how many captions are wanted.
        rules: What captions may and must hold (``Rules.of`` makes them of the settings); None
            is nothing but the greatest length.
        keys: A number for each image, (B,), from which sampling draws its random numbers; its
            samples don't depend on the other images then. None takes 0, 1, 2, ….

    Returns:
        For each image its hypotheses, best first: at least one, at most ``n_best``. In diverse
        search the best of each group come first. An image for which no caption that meets the
        rules was found has one without words and with a log-probability of -inf.

    Raises:
        SearchError: The model gives NaN for some image.
    """
    rules = rules or Rules(max_length=settings.max_length)
    beams = _Beams(len(state[0]), settings, rules, keys, state[0].device)
    for _ in range(settings.max_length):
        logits, state = step(beams.last_tokens, state, memory)
        origin = beams.advance(logits)
        left = beams.take_out_finished()
        if left is not None:
            origin, state = origin[left], tuple(part[left] for part in state)
            memory = tuple(part[left] for part in memory)
        state = _at(state, origin)
        if not len(beams.images):
            return beams.results()
    logits, _ = step(beams.last_tokens, state, memory)
    beams.end_all(logits)
    return beams.results()


def average(steps: Sequence[Step], states: Sequence[Tensors], memories: Sequence[Tensors]) -> Step:
    """Return a step function for an ensemble: the mean of the models' probabilities.

    Args:
        steps: Step functions of models with the same vocabulary.
        states: What each starts from; the ensemble's state is all of theirs, one after another.
        memories: The same for their memories.
    """

    def step(token_ids: Tensor, state: Tensors, memory: Tensors) -> tuple[Tensor, Tensors]:
        log_probabilities: list[Tensor] = []
        new: list[Tensor] = []
        for one, own_state, own_memory in zip(steps, states, memories, strict=True):
            s, m = len(own_state), len(own_memory)
            logits, advanced = one(token_ids, state[:s], memory[:m])
            state, memory = state[s:], memory[m:]
            log_probabilities.append(_log_softmax(logits))
            new += advanced
        return torch.stack(log_probabilities).logsumexp(0) - math.log(len(steps)), tuple(new)

    return step


class _Beams:
    """The hypotheses of the images that are not done yet: B images, K places, t tokens.

    Attributes:
        images: Which image each row is, (B,).
        token_ids: (B, K, t); PAD after EOS.
        scores: Log-probabilities, (B, K); -inf marks a place that holds no hypothesis. NaN, once
            there, stays: it counts as larger than all numbers.
        ended: Which hypotheses took EOS, (B, K).
        forced: How much of the forced phrases they hold, (B, K, C).
    """

    def __init__(
        self,
        images: int,
        settings: SearchConfig,
        rules: Rules,
        keys: Tensor | None,
        device: torch.device,
    ) -> None:
        self.settings, self.rules = settings, rules
        self.images = torch.arange(images, device=device)
        self.keys = self.images if keys is None else keys.to(device, torch.long)
        self.token_ids = torch.empty((images, 1, 0), dtype=torch.long, device=device)
        self.scores = torch.zeros((images, 1), device=device)
        self.ended = torch.zeros((images, 1), dtype=torch.bool, device=device)
        self.forced = torch.empty((images, 1, 0), dtype=torch.long, device=device)
        self._phrases: ForcedPhrases | None = None
        # Filled as images are done, and read once at the end.
        found = (images, settings.n_best)
        self._tokens = torch.full((*found, settings.max_length + 1), PAD, device=device)
        self._log_probabilities = torch.full(found, -torch.inf, device=device)
        self._ended = torch.zeros(found, dtype=torch.bool, device=device)

    @property
    def last_tokens(self) -> Tensor:
        """The tokens to go on from, (B, K)."""
        if not self.token_ids.shape[2]:
            return torch.full_like(self.ended, BOS, dtype=torch.long)
        return self.token_ids[..., -1]

    def advance(self, logits: Tensor) -> Tensor:
        """Give every place its next token; return from which place each comes, (B, K)."""
        words = logits.shape[2]
        if self.rules.forced and self._phrases is None:
            self._phrases = ForcedPhrases(self.rules.forced, words, logits.device)
            self.forced = self._phrases.begin(len(self.images))
        totals = _log_softmax(logits)
        self.scores = self.scores.to(totals.dtype)
        # One that has ended goes on as itself, with PAD, and before all others.
        totals += self.scores.masked_fill(self.ended, -torch.inf).unsqueeze(2)
        self._forbid(totals)
        totals[..., PAD].masked_fill_(self.ended, torch.inf)
        if self.settings.samples:
            best, chosen = self._choose_samples(totals)
        elif self.settings.groups > 1:
            best, chosen = self._choose_in_groups(totals)
        elif self._phrases:
            best, chosen = self._choose_in_banks(totals, self._phrases)
        else:
            best, chosen = _choose_best(totals, self.settings.beam_size)
        origin, tokens = chosen // words, chosen % words
        stays = best == torch.inf
        scores, token_ids, forced = _at((self.scores, self.token_ids, self.forced), origin)
        self.scores = torch.where(stays, scores, best)
        self.ended = stays | ((tokens == EOS) & (best > -torch.inf))
        self.token_ids = torch.cat([token_ids, tokens.unsqueeze(2)], 2)
        self.forced = self._phrases.after(forced, tokens) if self._phrases else forced
        return origin

    def _forbid(self, totals: Tensor) -> None:
        self.rules.forbid(totals, self.token_ids)
        if self._phrases:
            unmet = self._phrases.met(self.forced) < self._phrases.words
            totals[..., EOS].masked_fill_(unmet, -torch.inf)

    # Each of these takes the log-probabilities of all hypotheses with one token more, (B, K, V):
    # -inf for what is forbidden, inf for what has ended. It returns those of the new hypotheses,
    # and which they are in (B, K * V): (B, K') each.

    def _choose_in_groups(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Take each group's best; a word is worth less for each that took it (Vijayakumar 2016)."""
        images, places, words = totals.shape
        groups = self.settings.groups
        width = self.settings.beam_size // groups
        taken = totals.new_zeros((images, words))  # how often each word was, at this step
        groups_best, groups_chosen = [], []
        for group in range(groups):
            start = group * width if places > 1 else 0  # they all begin with the same hypothesis
            own = totals[:, start : start + width]
            penalty = self.settings.diversity * taken
            best, chosen = _choose_best(own - penalty.unsqueeze(1), width)
            tokens = chosen % words
            counts = (tokens != EOS) & (best.abs() < torch.inf)
            taken.scatter_add_(1, tokens, counts.to(taken.dtype))
            chosen = chosen + start * words
            scores = totals.flatten(1).gather(1, chosen)
            groups_best.append(scores.masked_fill(best == -torch.inf, -torch.inf))
            groups_chosen.append(chosen)
        return torch.cat(groups_best, 1), torch.cat(groups_chosen, 1)

    def _choose_in_banks(self, totals: Tensor, phrases: ForcedPhrases) -> tuple[Tensor, Tensor]:
        """Take the best of those that hold 0, 1, 2, … forced words (Hokamp and Liu 2017)."""
        met = phrases.met_after_each(self.forced)
        banks = [
            _choose_best(totals.masked_fill(met != words, -torch.inf), self.settings.beam_size)
            for words in range(phrases.words + 1)
        ]
        best, chosen = (torch.cat(parts, 1) for parts in zip(*banks, strict=True))
        return best, chosen

    def _choose_samples(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Draw each hypothesis's next token, from the likeliest ``top_k`` and ``top_p`` of them.

        Nucleus sampling: Holtzman et al. 2020. One random number picks a place on the line on
        which the tokens' probabilities are laid out, the likeliest first.
        """
        settings, samples = self.settings, self.settings.samples
        places, words = totals.shape[1:]
        tempered = (totals / settings.temperature).clamp(max=0.0)  # PAD's inf after an end
        ordered, tokens = tempered.sort(dim=-1, descending=True, stable=True)
        if settings.top_k:
            ordered, tokens = ordered[..., : settings.top_k], tokens[..., : settings.top_k]
        shares = ordered.softmax(-1)
        ends = shares.cumsum(-1)
        within = ends - shares < settings.top_p  # the first to pass top_p is the last to count
        total = torch.where(within, ends, 0.0).amax(-1, keepdim=True)
        numbers = torch.arange(samples, device=totals.device)
        draw = _uniform(settings.seed, self.keys, numbers, self.token_ids.shape[2])
        passed = (ends <= draw.unsqueeze(2).to(ends.dtype) * total).sum(-1, keepdim=True)
        # Rounding must not push the draw past the last token that counts.
        place = torch.minimum(passed, within.sum(-1, keepdim=True) - 1).clamp(min=0)
        token = tokens.expand(-1, samples, -1).gather(2, place).squeeze(2)
        chosen = token + words * numbers.clamp(max=places - 1)
        return totals.flatten(1).gather(1, chosen), chosen

    def take_out_finished(self) -> Tensor | None:
        """Keep the results of images that are done; return the rows that are left, if fewer."""
        done = self._done()
        left = len(done) - int(done.sum())  # the step's one wait for the device
        if left == len(done):
            return None
        rows = torch.argsort(done, stable=True)
        going, gone = rows[:left], rows[left:]
        self._keep(gone)
        for name in ("images", "keys", "token_ids", "scores", "ended", "forced"):
            setattr(self, name, getattr(self, name)[going])
        return going

    def _done(self) -> Tensor:
        """Tell which images can't get better captions any more, (B,)."""
        alive = ~self.ended & (self.scores != -torch.inf)
        if self.settings.samples:
            return ~alive.any(1)
        groups = self.settings.groups
        wanted = -(-self.settings.n_best // groups)
        ranks = self._ranks().masked_fill(~self.ended, -torch.inf).unflatten(1, (groups, -1))
        finished = ranks.topk(min(wanted, ranks.shape[2])).values[..., -1]  # (B, groups)
        # Log-probabilities only fall, and count least when spread over the longest caption.
        reachable = self.scores / (self.settings.max_length + 1) ** self.settings.length_penalty
        reachable = reachable.masked_fill(~alive, -torch.inf).unflatten(1, (groups, -1)).amax(2)
        return (reachable <= finished).all(1) | ~alive.any(1)

    def end_all(self, logits: Tensor) -> None:
        """Let all that are left take EOS: their captions have ``max_length`` words."""
        ends = self.scores + _log_softmax(logits)[..., EOS]
        if self._phrases:
            unmet = self._phrases.met(self.forced) < self._phrases.words
            self.scores, ends = (
                part.masked_fill(unmet, -torch.inf) for part in (self.scores, ends)
            )
        ending = ~self.ended & (ends != -torch.inf)  # NaN is let through, to be found
        self.scores = torch.where(ending, ends, self.scores)
        self.token_ids = torch.nn.functional.pad(self.token_ids, (0, 1), value=PAD)
        self.token_ids[..., -1].masked_fill_(ending, EOS)
        self.ended = self.ended | ending
        self._keep(torch.arange(len(self.images), device=logits.device))

    def results(self) -> list[list[Hypothesis]]:
        """Return what was found for each image, unless the model gave NaN.

        Raises:
            SearchError: It did.
        """
        bad = int(self._log_probabilities.isnan().any(1).sum())
        if bad:
            raise SearchError(
                f"the model gives NaN instead of probabilities for {bad} of "
                f"{len(self._tokens)} images; its weights are damaged or its numbers overflow: "
                "try float32 precision or another checkpoint"
            )
        columns = (self._tokens, self._log_probabilities, self._ended)
        return [
            [
                Hypothesis([t for t in ids if t not in (PAD, EOS)], score, end)
                for ids, score, end in zip(*best, strict=True)
                if score != -math.inf
            ]
            or [Hypothesis([], -math.inf, False)]
            for best in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def _ranks(self) -> Tensor:
        lengths = (self.token_ids != PAD).sum(2).clamp(min=1)
        return self.scores / lengths**self.settings.length_penalty

    def _keep(self, rows: Tensor) -> None:
        """Put the best hypotheses of these rows where ``results`` finds them."""
        ranks, ended = self._ranks()[rows], self.ended[rows]
        order = _order(ranks, ended)
        groups = 1 if self.settings.samples else self.settings.groups
        if groups > 1:  # first the best of each group, then the second of each, …
            width = ranks.shape[1] // groups
            position = torch.empty_like(order)
            in_groups = _order(ranks.view(-1, width), ended.view(-1, width))
            position.view(-1, width).scatter_(
                1, in_groups, torch.arange(width, device=order.device).expand_as(in_groups)
            )
            order = order.gather(1, position.gather(1, order).argsort(dim=1, stable=True))
        order = order[:, : self.settings.n_best]
        images = self.images[rows].unsqueeze(1)
        places = torch.arange(order.shape[1], device=order.device)
        tokens, scores, ended = _at((self.token_ids[rows], self.scores[rows], ended), order)
        self._tokens[images, places, : tokens.shape[2]] = tokens
        self._log_probabilities = self._log_probabilities.to(scores.dtype)
        self._log_probabilities[images, places] = scores
        self._ended[images, places] = ended


def _log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities in float32, or in float64 if the logits are."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    if logits.dtype == precise or logits.device.type != "cpu":
        return torch.log_softmax(logits, -1, dtype=precise)
    scores = logits.to(precise)  # two of this size would leave the caches
    torch.log_softmax(scores, -1, out=scores)
    return scores


def _choose_best(totals: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Take the ``size`` best of each image: see ``_Beams``; places left over hold nothing."""
    flat = totals.flatten(1)
    best, chosen = flat.topk(min(size, flat.shape[1]))
    left_over = (0, size - best.shape[1])
    pad = torch.nn.functional.pad
    return pad(best, left_over, value=-torch.inf), pad(chosen, left_over)


def _order(ranks: Tensor, ended: Tensor) -> Tensor:
    """Return places in order: those that ended before those that were cut off, then by rank."""
    order = torch.argsort(ranks, dim=1, descending=True, stable=True)
    return order.gather(1, torch.argsort(~ended.gather(1, order), dim=1, stable=True))


def _at(parts: Tensors, origin: Tensor) -> Tensors:
    """Return what lies at the places ``origin``: parts (B, K, …) and (B, K') give (B, K', …)."""
    if not parts:
        return ()
    rows = torch.arange(len(origin), device=origin.device).unsqueeze(1) * parts[0].shape[1]
    flat = (rows + origin).flatten()
    return tuple(
        part.flatten(0, 1).index_select(0, flat).unflatten(0, origin.shape) for part in parts
    )


def _uniform(seed: int, keys: Tensor, numbers: Tensor, step: int) -> Tensor:
    """Return a random number from 0 to 1 for each image and sample, (B, K), float32.

    A function of its arguments alone (SplitMix64's mixer: Steele, Lea and Flood, 2014), so that
    it is the same in any batch and on any device.
    """
    mixed = torch.zeros_like(keys).unsqueeze(1)
    for part in (seed, keys.unsqueeze(1), numbers.unsqueeze(0), step):
        mixed = mixed + part + -0x61C8864680B583EB  # 64-bit arithmetic that wraps around
        mixed = (mixed ^ _shifted(mixed, 30)) * -0x40A7B892E31B1A47
        mixed = (mixed ^ _shifted(mixed, 27)) * -0x6B2FB644ECCEEE15
        mixed = mixed ^ _shifted(mixed, 31)
    return _shifted(mixed, 40).float() * 2.0**-24


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shift 64-bit numbers to the right, filling up with zeros."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
