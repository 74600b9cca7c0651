"""The parts of ``benchmark.py`` that look at decoding alone; run that one."""

import operator
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from captioner.config import SearchConfig
from captioner.data.vocabulary import BOS, EOS, PAD, UNK
from captioner.inference.captioner import Captioner
from captioner.models.captioning_model import generate
from captioner.models.decoder import Decoder
from captioner.models.inference_decoder import InferenceDecoder

PRODUCTS = ("linear", "_linear_pointwise", "mm", "addmm", "bmm", "baddbmm")
TIMES = 3  # the shortest is taken: other work on the machine only adds to it


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Return how long something takes: the shortest of so many times."""
    durations = []
    for _ in range(times):
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        durations.append(time.perf_counter() - started)
    return min(durations)


class Products(TorchDispatchMode):
    """Records the matrix products within its context, backwards too, to run them alone.

    Attributes:
        calls: (operation, its arguments, those with names).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in PRODUCTS:
            named = {name: value for name, value in kwargs.items() if name != "out"}
            # Into a tensor of its own: rows of the operands may be left out later.
            alone = function.overloadpacket.default if "out" in kwargs else function
            self.calls.append((alone, list(args), named))
        return function(*args, **kwargs)

    @torch.inference_mode()
    def run(self) -> None:
        """Compute them once more."""
        for function, operands, named in self.calls:
            function(*operands, **named)


def products_alone(
    captioner: Captioner, features: Sequence[Tensor], search: SearchConfig
) -> Callable[[], object]:
    """Return what does decoding's matrix products by themselves.

    They are those for the images themselves and for the steps that the search took, for the
    hypotheses that had not ended.
    """
    (decoder,) = captioner.decoders
    recorded = Products()

    class Recorded(type(decoder)):  # type: ignore[misc] # the same decoder, watched
        def __init__(self) -> None:
            self.__dict__ = decoder.__dict__

        def init_state(self, features: Tensor) -> Any:
            with Products() as products:
                result = super().init_state(features)
            recorded.calls.extend(products.calls)
            return result

        def step(self, token_ids: Tensor, state: Any, memory: Any) -> Any:
            live = int((token_ids != PAD).sum())
            with Products() as products:
                result = super().step(token_ids, state, memory)
            for function, operands, named in products.calls:
                if function.overloadpacket.__name__ != "bmm":  # that is one for each image
                    rows = operands[0].flatten(0, -2)
                    if len(rows) != live:  # those that have ended are among them
                        operands[0] = rows[: len(rows) * live // token_ids.numel()]
                recorded.calls.append((function, operands, named))
            return result

    for batch in features:
        generate([Recorded()], [batch], search, captioner.model.vocabulary)

    recorded.run()
    return recorded.run


def decoder_alone(captioner: Captioner, features: Tensor) -> dict[str, float]:
    """Return captions/s by beam and batch size."""
    rates = {}
    for beam_size in (1, 3, 5, 10):
        search = captioner.search(beam_size=beam_size)
        for batch_size in (1, 16, 64, 256):
            batches = features[: 64 if batch_size == 1 else 256].split(batch_size)

            def run(batches: Any = batches, search: SearchConfig = search) -> None:
                for batch in batches:
                    captioner.hypotheses([batch], search)

            run()
            count = sum(map(len, batches))
            name = f"beam {beam_size}, batch {batch_size}"
            rates[name] = count / seconds_of(run, captioner.device, TIMES)
    return rates


@torch.inference_mode()
def published_search(decoder: Decoder, features: Tensor, settings: SearchConfig) -> list[int]:
    """Find one image's caption the way it is commonly published.

    One image at a time, its features copied for each beam and prepared anew at each step,
    finished beams kept in Python lists, no stop before all have ended.
    """
    size = settings.beam_size
    finished: list[tuple[float, list[int]]] = []
    features = features.float().expand(size, -1, -1)  # (K, N, D)
    state, _ = decoder.init_state(features)
    sequences = torch.full((size, 1), BOS, device=features.device)
    totals = torch.zeros(size, 1, device=features.device)
    for length in range(settings.max_length + 1):
        _, memory = decoder.init_state(features)
        logits, state = decoder.next_logits(sequences[:, -1:], state, memory)
        log_probabilities = logits.squeeze(1).log_softmax(1)
        log_probabilities[:, [PAD, BOS, UNK]] = -torch.inf
        candidates = totals + log_probabilities
        penalty = (length + 1) ** settings.length_penalty
        if length == settings.max_length:  # nothing but the end can follow
            ends = (candidates[:, EOS] / penalty).tolist()
            finished += zip(ends, sequences[:, 1:].tolist(), strict=True)
            break
        if length == 0:  # all beams are the same yet
            candidates = candidates[:1]
        best, places = candidates.flatten().topk(size)
        origin, tokens = places // candidates.shape[1], places % candidates.shape[1]
        sequences = torch.cat([sequences[origin], tokens.unsqueeze(1)], 1)
        ended = (tokens == EOS).tolist()
        for place in (place for place, has_ended in enumerate(ended) if has_ended):
            finished.append((best[place].item() / penalty, sequences[place, 1:-1].tolist()))
        rows = (tokens != EOS).nonzero().squeeze(1)
        size = len(rows)
        if not size:
            break
        sequences, totals = sequences[rows], best[rows].unsqueeze(1)
        state = tuple(part[origin[rows]] for part in state)
        features = features[origin[rows]]
    return max(finished, key=operator.itemgetter(0))[1]


def against_published(captioner: Captioner, features: Tensor) -> dict[str, float]:
    """Compare captions and captions/s with ``published_search``, both in float32, at beam 5."""
    decoder = captioner.model.decoder
    search = captioner.search(beam_size=5)
    some = features[:64]
    dtypes = (torch.float32, captioner.precision)
    steps = {dtype: InferenceDecoder(decoder, dtype) for dtype in dtypes}
    captions: dict[Any, list[list[int]]] = {}

    def published() -> None:
        captions["published"] = [published_search(decoder, x, search) for x in some.split(1)]

    def ours(dtype: torch.dtype) -> None:
        batches = features.split(128)
        best = [
            image[0].token_ids
            for batch in batches
            for image in generate([steps[dtype]], [batch], search, captioner.model.vocabulary)
        ]
        captions[dtype] = best[: len(some)]

    published_search(decoder, some[:1], search)
    rate = len(some) / seconds_of(published, captioner.device, TIMES)
    rates = {"published, float32, captions/s": rate}
    for dtype in steps:
        ours(dtype)
        our_rate = len(features) / seconds_of(partial(ours, dtype), captioner.device, TIMES)
        name = str(dtype).removeprefix("torch.")
        rates[f"ours, {name}, captions/s"] = our_rate
        rates[f"ours, {name}, times as fast"] = our_rate / rate
        same = sum(map(operator.eq, captions["published"], captions[dtype])) / len(some)
        rates[f"ours, {name}, share of captions that are equal"] = same
    return rates


def batches_alike(captioner: Captioner, features: Tensor) -> dict[str, float]:
    """Count images whose caption depends on the batch they come in, by precision."""
    search, vocabulary = captioner.search(beam_size=5), captioner.model.vocabulary
    counts = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        steps = InferenceDecoder(captioner.model.decoder, dtype)

        def captions_of(size: int, steps: InferenceDecoder = steps) -> list[list[int]]:
            return [
                image[0].token_ids
                for batch in features.split(size)
                for image in generate([steps], [batch], search, vocabulary)
            ]

        alone = captions_of(1)
        for size in (7, 64, len(features)):
            differing = sum(map(operator.ne, alone, captions_of(size)))
            counts[f"{str(dtype).removeprefix('torch.')}, batches of {size}"] = float(differing)
    return counts
