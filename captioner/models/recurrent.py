"""Recurrent layers over whole sequences, by torch's fused kernels: LSTM, GRU and vanilla RNN.

Single steps are taken from the same weights by the equations of ``models.recurrent_cells``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from captioner.device import without_autocast
from captioner.models.recurrent_cells import (
    CELL_STEPS,
    CELLS,
    INITIALISATIONS,
    KEEP_ALL,
    Gates,
    Layer,
    State,
    initialise_bias,
    initialise_gates,
    states_per_layer,
    step_layers,
)

# torch's kernels for whole sequences: cuDNN's or oneDNN's where there are such.
FUSED_KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    cell: getattr(torch, cell) for cell in CELLS
}


@dataclass(frozen=True)
class Unrolled:
    """A run of a stack, step by step.

    Attributes:
        outputs: h of the top layer at every step, (rows, T, H).
        state: The last state, (L, rows, H) each.
        states: For each layer its state at each step, h or h and c, (rows, H) each, as the graph
            holds them.
        gates: For each layer its gate activations by name, (rows, T, H): see ``CELL_STEPS``.

    Of a bidirectional stack as ``RecurrentStack`` says; ``states`` and ``gates`` have the two
    directions of each layer one after the other, and their steps in the order of reading.
    """

    outputs: Tensor
    state: State
    states: list[list[State]]
    gates: list[dict[str, Tensor]]


class RecurrentStack(nn.Module):
    """Recurrent layers on top of each other, over whole sequences; the weights are those of torch.

    A bidirectional stack (Schuster and Paliwal 1997) has a second recurrence in each layer, which
    reads from the last real step to the first; the next layer reads the h of both side by side.
    As with Keras' ``Bidirectional``, which concatenates: outputs are 2H wide, forward before
    backward, and the last h is that of each direction where it ends, at the last step and at the
    first. States are (2L, rows, H), the two directions of each layer one after the other. As it
    reads from the end, it can't take single steps, and no window can be cut.

    Args:
        cell: One of ``CELLS``.
        input_size: D, width of the input of the first layer.
        hidden_size: H.
        layers: L.
        dropout: Share of units dropped between the layers.
        return_sequences: As in Keras: return h of the top layer at every step, not the last alone.
        return_state: As in Keras: return the last state too.
        initialisation: Of the recurrent weights, one of ``INITIALISATIONS``.
        forget_bias: What the bias of the LSTM's forget gate begins with.
        bidirectional: Read in both directions.

    Attributes:
        fused: torch.nn's module.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        layers: int = 1,
        dropout: float = 0.0,
        return_sequences: bool = False,
        return_state: bool = False,
        initialisation: str = "orthogonal",
        forget_bias: float = 1.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.cell, self.hidden_size = cell, hidden_size
        self.directions = ("", "_reverse") if bidirectional else ("",)  # as torch names weights
        self.return_sequences, self.return_state = return_sequences, return_state
        self.fused = _fused_module(cell, input_size, hidden_size, layers, dropout, bidirectional)
        for input_weight, input_bias, weight, bias in self.layer_weights():
            initialise_gates(input_weight, hidden_size, nn.init.xavier_uniform_)
            initialise_bias(input_bias, cell, hidden_size, forget_bias)
            initialise_gates(weight, hidden_size, INITIALISATIONS[initialisation])
            nn.init.zeros_(bias)

    @property
    def depth(self) -> int:
        """How many layers."""
        return self.fused.num_layers

    @property
    def output_size(self) -> int:
        """Width of the output: H, or 2H in both directions."""
        return len(self.directions) * self.hidden_size

    def layer_weights(self) -> list[tuple[Tensor, ...]]:
        """Return of each layer W_x (gates * H, D), its bias, W_h (gates * H, H) and its bias.

        The two directions of a layer come one after the other.
        """
        names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
        return [
            tuple(getattr(self.fused, f"{name}_l{number}{direction}") for name in names)
            for number in range(self.depth)
            for direction in self.directions
        ]

    def project(self, x: Tensor) -> Tensor:
        """Return W_x x + b of the first layer, for ``step``: (…, D) gives (…, gates * H)."""
        weight, bias, *_ = self.layer_weights()[0]
        return linear(x, weight, bias)

    def step(self, projected: Tensor, state: State, recurrent_dropout: Layer = KEEP_ALL) -> State:
        """Take one step by the equations: see ``step_layers``.

        Raises:
            ValueError: The stack is bidirectional.
        """
        if len(self.directions) > 1:
            raise ValueError("a bidirectional stack takes no single steps: it reads from the end")
        weights = self.layer_weights()
        return step_layers(
            self.cell,
            projected,
            state,
            [partial(linear, weight=layer[2], bias=layer[3]) for layer in weights],
            [partial(linear, weight=layer[0], bias=layer[1]) for layer in weights[1:]],
            partial(nn.functional.dropout, p=self.fused.dropout, training=self.training),
            recurrent_dropout,
        )

    def zero_state(self, x: Tensor) -> State:
        """Return the state before the first step, for single steps: x (…, D) gives (…, H) each."""
        zeros = x.new_zeros((*x.shape[:-1], self.hidden_size))
        return (zeros,) * (self.depth * states_per_layer(self.cell))

    def stack_state(self, state: State) -> State:
        """Turn a state for single steps, (B, K, H) each, into one for sequences, (L, B * K, H)."""
        per_layer = states_per_layer(self.cell)
        return tuple(
            torch.stack([part.flatten(0, -2) for part in state[kind::per_layer]])
            for kind in range(per_layer)
        )

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        bptt_window: int = 0,
    ) -> Tensor | tuple[Tensor, State]:
        """Run over sequences.

        Args:
            x: (rows, T, D).
            state: Before the first step, (L, rows, H) each; None is zeros.
            lengths: How many steps of each row are real, (rows,), where rows are padded at the
                end: the last h and the last state are those after the last real step, and what
                follows in a sequence is 0. None takes all.
            bptt_window: Truncated back-propagation through time (Williams and Peng 1990): after
                so many steps the state goes on, and the gradient doesn't come back. 0 cuts nowhere.

        Returns:
            h of the top layer: (rows, T, H) with ``return_sequences``, else (rows, H). With
            ``return_state`` also the last state.

        Raises:
            ValueError: A bidirectional stack is given a ``bptt_window``.
        """
        self._check_window(bptt_window)
        window = bptt_window or x.shape[1]
        outputs = []
        for start in range(0, x.shape[1], window):
            remaining = None if lengths is None else lengths - start
            part = x[:, start : start + window]
            window_output, state = self._run_window(part, state, remaining, start > 0)
            outputs.append(window_output)
        assert state is not None
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        last = state[0][-len(self.directions) :].transpose(0, 1).flatten(1)
        output = whole if self.return_sequences else last
        return (output, state) if self.return_state else output

    def _run_window(
        self, x: Tensor, state: State | None, lengths: Tensor | None, cut: bool
    ) -> tuple[Tensor, State]:
        """Run over a window; with ``cut`` no gradient comes back from it to the state before."""
        state = self._zeros(x) if state is None else state
        before = tuple(part.detach() for part in state) if cut else state
        if lengths is None:
            return self._run_fused((x,), before)
        # The rows that have steps left, the longest first.
        active = lengths.argsort(descending=True)[: int((lengths > 0).sum())]
        if not len(active):
            return x.new_zeros((*x.shape[:2], self.output_size)), state
        steps = lengths[active].clamp(max=x.shape[1]).cpu()
        packed = pack_padded_sequence(x[active], steps, batch_first=True)
        hidden, new = self._run_fused(
            (packed.data, packed.batch_sizes), tuple(part[:, active] for part in before)
        )
        output = pad_packed_sequence(
            PackedSequence(hidden, packed.batch_sizes), batch_first=True, total_length=x.shape[1]
        )[0]
        outputs = output.new_zeros((len(x), *output.shape[1:])).index_copy(0, active, output)
        pairs = zip(state, new, strict=True)
        return outputs, tuple(old.to(n.dtype).index_copy(1, active, n) for old, n in pairs)

    def _run_fused(self, inputs: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        """Run torch's fused kernels on a batch, (x,), or on packed rows, (data, batch sizes).

        Autocast is off in here: on CUDA it would compute in float16, whatever its own dtype, and
        without loss scaling small gradients vanish in float16.
        """
        weights = [weight for layer in self.fused.all_weights for weight in layer]
        dtype = _fused_dtype(weights[0])
        state = tuple(part.to(dtype).contiguous() for part in state)  # for cuDNN
        batch_first = (True,) if len(inputs) == 1 else ()
        with without_autocast(weights[0].device):
            output, *new = FUSED_KERNELS[self.cell](
                inputs[0].to(dtype),
                *inputs[1:],
                state if self.cell == "lstm" else state[0],
                [weight.to(dtype) for weight in weights],
                True,  # there are biases
                self.depth,
                self.fused.dropout,
                self.training,
                self.fused.bidirectional,
                *batch_first,
            )
        return output, tuple(new)

    def _zeros(self, x: Tensor) -> State:
        zeros = x.new_zeros((self.depth * len(self.directions), len(x), self.hidden_size))
        return (zeros,) * states_per_layer(self.cell)

    def _check_window(self, bptt_window: int) -> None:
        if bptt_window and len(self.directions) > 1:
            raise ValueError(
                f"bptt_window={bptt_window} can't cut a bidirectional stack, which reads from the "
                "end as well"
            )

    def unroll(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        bptt_window: int = 0,
    ) -> Unrolled:
        """Run over sequences by the equations, one step after the other: the readable reference.

        It computes what ``forward`` computes, output and gradient, from the same weights; slower,
        but everything in between can be seen. Arguments are those of ``forward``.
        """
        self._check_window(bptt_window)
        initial = self._zeros(x) if state is None else state
        states: list[list[State]] = []
        gates: list[dict[str, Tensor]] = []
        weights = self.layer_weights()
        for layer in range(self.depth):
            if layer:
                x = nn.functional.dropout(x, self.fused.dropout, self.training)
            outputs = []
            for direction in self.directions:
                place = len(states)
                layer_state = tuple(part[place] for part in initial)
                read = reverse_rows(x, lengths) if direction else x
                steps, layer_gates = self._unroll_layer(
                    read, layer_state, weights[place], lengths, bptt_window
                )
                h = torch.stack([state[0] for state in steps], 1)
                outputs.append(reverse_rows(h, lengths) if direction else h)
                states.append(steps)
                gates.append(layer_gates)
            x = torch.cat(outputs, 2)
            if lengths is not None:
                beyond = torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)
                x = x.masked_fill(beyond.unsqueeze(2), 0.0)
        last = tuple(torch.stack(parts) for parts in zip(*(s[-1] for s in states), strict=True))
        return Unrolled(x, last, states, gates)

    def _unroll_layer(
        self,
        x: Tensor,
        state: State,
        weights: tuple[Tensor, ...],
        lengths: Tensor | None,
        bptt_window: int,
    ) -> tuple[list[State], dict[str, Tensor]]:
        """Return one layer's state at each step, and its gates (rows, T, H) by name."""
        input_weight, input_bias, weight, bias = weights
        states: list[State] = []
        gates: list[Gates] = []
        for t, projected in enumerate(linear(x, input_weight, input_bias).unbind(1)):
            cut = bptt_window and t and t % bptt_window == 0
            before = tuple(part.detach() for part in state) if cut else state
            step_gates: Gates = {}
            from_hidden = linear(before[0], weight, bias)
            new = CELL_STEPS[self.cell](projected, from_hidden, before, step_gates)
            if lengths is not None:  # a row that has ended keeps its state, and its gradient
                real = (t < lengths).unsqueeze(1)
                pairs = zip(new, state, strict=True)
                new = tuple(torch.where(real, part, old) for part, old in pairs)
            state = new
            states.append(state)
            gates.append(step_gates)
        stacked = {name: torch.stack([step[name] for step in gates], 1) for name in gates[0]}
        return states, stacked


def reverse_rows(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Reverse the real steps of each row, (rows, T, …); what follows them stays where it is."""
    if lengths is None:
        return x.flip(1)
    places = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    ends = lengths.to(x.device).unsqueeze(1)
    places = torch.where(places < ends, ends - 1 - places, places)
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), places]


def _fused_dtype(weight: Tensor) -> torch.dtype:
    """Return in which dtype the kernels compute: autocast's on the CPU, else the weights'.

    cuDNN's recurrences take bfloat16 in the latest releases alone; float32 they multiply on tensor
    cores too (TF32).
    """
    is_cast = torch.is_autocast_enabled("cpu") and weight.dtype == torch.float32
    return torch.get_autocast_dtype("cpu") if is_cast and weight.is_cpu else weight.dtype


def _fused_module(
    cell: str, input_size: int, hidden_size: int, layers: int, dropout: float, bidirectional: bool
) -> nn.RNNBase:
    options: dict[str, Any] = {
        "batch_first": True,
        "dropout": dropout if layers > 1 else 0.0,
        "bidirectional": bidirectional,
    }
    if cell == "lstm":
        return nn.LSTM(input_size, hidden_size, layers, **options)
    if cell == "gru":
        return nn.GRU(input_size, hidden_size, layers, **options)
    options["nonlinearity"] = cell.removeprefix("rnn_")
    return nn.RNN(input_size, hidden_size, layers, **options)
