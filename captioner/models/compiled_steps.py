"""Steps of a decoder by torch.compile: what a GPU does in each of them is too little to fill it."""

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.functional import pad

from captioner.data.vocabulary import PAD
from captioner.errors import ConfigError
from captioner.models.decoder import Decoder, Memory, State, chosen_rows

# Steps that are compiled as one, so that one program serves captions of every length. The more,
# the longer it takes to compile, and the more steps are taken for nothing at a caption's end.
STEPS = 4


class CompiledSteps:
    """Runs a decoder over captions as ``Decoder.run_steps`` does, by a compiled program.

    Its shapes are fixed: all captions of a batch take all steps, up to a multiple of ``STEPS``.
    On a GPU a program is a CUDA graph, launched as one.

    Args:
        decoder: In training; its weights are read at each call.
        backend: Of torch.compile.

    Attributes:
        shape: (B, K) of the batches it is compiled for, those of the first one; others, as the last
            of an epoch, go step by step.
    """

    def __init__(self, decoder: Decoder, backend: str = "inductor") -> None:
        self.shape: tuple[int, int] | None = None
        self._decoder = decoder
        torch.compiler.reset()  # else programs of stages before count towards torch's limit
        on_gpu = decoder.embedding.weight.is_cuda and backend == "inductor"
        self._program = torch.compile(
            self._take_steps,
            fullgraph=True,
            dynamic=False,
            backend=backend,
            mode="reduce-overhead" if on_gpu else None,
        )

    def run(
        self,
        inputs: Tensor,
        state: State,
        memory: Memory,
        real: Tensor,
        bptt_window: int = 0,
        trace: list[State] | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Run over whole captions; see ``Decoder.run_sequence``.

        Raises:
            ConfigError: There is no compiler, or it fails.
        """
        shape = (inputs.shape[0], inputs.shape[1])
        self.shape = self.shape or shape
        if shape != self.shape or trace is not None or bptt_window % STEPS:
            return self._decoder.run_steps(inputs, state, memory, real, bptt_window, trace)
        length = int(real.any(0).any(0).sum())
        chosen = real[..., :length].permute(2, 0, 1)  # (T, B, K)
        is_real = pad(chosen, margin := (0, 0, 0, 0, 0, -length % STEPS)).contiguous()
        is_real = is_real.to(inputs.device, non_blocking=True)
        # Steps first: any few of them lie in memory as any others do, which programs rely on.
        inputs = pad(inputs[..., :length].permute(2, 0, 1), margin, value=PAD).contiguous()
        words = self._decoder.word_inputs(inputs)
        state = tuple(map(_as_after_a_step, state))
        parts, attention = [], None
        for start in range(0, len(inputs), STEPS):
            if bptt_window and start and start % bptt_window == 0:
                state = tuple(_as_after_a_step(part.detach()) for part in state)
            few = slice(start, start + STEPS)
            of_steps = tuple(part[few] for part in words)
            output, state, weights = self._advance(
                inputs[few], of_steps, state, memory, is_real[few]
            )
            parts.append(output)
            if weights is not None:
                attention = weights if attention is None else attention + weights
        outputs = (torch.cat(column)[:length] for column in zip(*parts, strict=True))
        if attention is not None:
            attention = chosen_rows(attention, real.any(-1))
        positions = chosen.nonzero()[:, [1, 2, 0]]
        return tuple(chosen_rows(part, chosen) for part in outputs), positions, attention

    def _advance(self, *args: Any) -> tuple[tuple[Tensor, ...], State, Tensor | None]:
        """Take S steps by the program; the first call compiles it."""
        try:
            return self._program(*args)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            raise ConfigError(
                f"training.compile: torch.compile failed: {reason}; false trains without it"
            ) from error

    def _take_steps(
        self,
        inputs: Tensor,
        words: tuple[Tensor, ...],
        state: State,
        memory: Memory,
        is_real: Tensor,
    ) -> tuple[tuple[Tensor, ...], State, Tensor | None]:
        """Take S steps: inputs (S, B, K), words (S, B, K, …).

        Returns:
            The outputs (S, B, K, …), the state, and the sum of the attention, (B, K, N).
        """
        outputs, attention = [], None
        for t in range(STEPS):
            of_step = tuple(part[t] for part in words)
            output, state, weights = self._decoder.step(inputs[t], of_step, state, memory)
            outputs.append(output)
            if weights is not None:
                weights = weights * is_real[t].unsqueeze(-1)
                attention = weights if attention is None else attention + weights
        columns = zip(*outputs, strict=True)
        return tuple(torch.stack(parts) for parts in columns), state, attention


def _as_after_a_step(part: Tensor) -> Tensor:
    """Return a first state laid out as later ones: one program serves for all."""
    part = part.contiguous()
    return part if part.requires_grad or not torch.is_grad_enabled() else part.requires_grad_()
