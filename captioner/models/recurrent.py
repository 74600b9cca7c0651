"""Recurrent layers by cell: torch.nn's fused ones for whole sequences, one readable step else.

``RecurrentStack`` runs whole sequences by torch.nn's fused module, and single steps by the
equations below from the same weights. ``CellStack`` takes single steps alone, for decoders whose
next input depends on the last state, as with attention. Both take the input of a step as the
first layer's weights have made it, W_x x + b: what is known beforehand is multiplied once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")

# How the recurrent weights of each gate, (H, H), begin.
INITIALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonal": nn.init.orthogonal_,  # keeps the length of h (Saxe et al. 2014)
    "xavier": nn.init.xavier_uniform_,  # Glorot and Bengio 2010
    "identity": nn.init.eye_,  # with rnn_relu the IRNN (Le et al. 2015)
}

# The state of a stack. For single steps: h of each layer, or h and c, (…, H) each, one after the
# other (h0, c0, h1, c1). For whole sequences: h, or h and c, of all layers, (L, rows, H) each, as
# torch.nn has it.
State = tuple[Tensor, ...]


def states_per_layer(cell: str) -> int:
    """Return how many tensors a layer's state is: 2 for the LSTM (h and c), else 1."""
    return 2 if cell == "lstm" else 1


# --- the equations ----------------------------------------------------------------------------
#
# Each function takes W_x x(t) + b and W_h h(t-1) + b', (…, gates * H), and the state of the layer;
# it returns the new state. The gates are in torch's order. A dict, where one is given, is filled
# with the activations of the gates, (…, H).

Gates = dict[str, Tensor]


def lstm_step(
    from_input: Tensor, from_hidden: Tensor, state: State, gates: Gates | None = None
) -> State:
    """Take a step of the LSTM (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

    c(t) = f * c(t-1) + i * g and h(t) = o * tanh(c(t)).
    """
    i, f, g, o = (from_input + from_hidden).chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    if gates is not None:
        gates.update(input=i, forget=f, candidate=g, output=o)
    c = f * state[1] + i * g
    return o * torch.tanh(c), c


def gru_step(
    from_input: Tensor, from_hidden: Tensor, state: State, gates: Gates | None = None
) -> State:
    """Take a step of the GRU (Cho et al. 2014, with the reset gate after the product).

    h(t) = (1 - z) * n + z * h(t-1): where the update gate z is 1, nothing is updated.
    """
    reset, update, new = from_input.chunk(3, -1)
    from_reset, from_update, from_new = from_hidden.chunk(3, -1)
    r, z = torch.sigmoid(reset + from_reset), torch.sigmoid(update + from_update)
    n = torch.tanh(new + r * from_new)
    if gates is not None:
        gates.update(reset=r, update=z, candidate=n)
    return ((1 - z) * n + z * state[0],)


def tanh_step(
    from_input: Tensor, from_hidden: Tensor, state: State, gates: Gates | None = None
) -> State:
    """Take a step of the vanilla RNN (Elman 1990); it has no gates."""
    return (torch.tanh(from_input + from_hidden),)


def relu_step(
    from_input: Tensor, from_hidden: Tensor, state: State, gates: Gates | None = None
) -> State:
    """Take a step of the vanilla RNN with rectified units (Le et al. 2015); it has no gates."""
    return (torch.relu(from_input + from_hidden),)


CELL_STEPS: dict[str, Callable[[Tensor, Tensor, State, Gates | None], State]] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": tanh_step,
    "rnn_relu": relu_step,
}
GATE_COUNTS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

Layer = Callable[[Tensor], Tensor]


def step_layers(
    cell: str,
    projected: Tensor,
    state: State,
    from_hidden: Sequence[Layer],
    from_below: Sequence[Layer],
    dropout: Layer,
) -> State:
    """Take one step through all layers.

    Args:
        cell: One of ``CELLS``.
        projected: W_x x + b of the first layer, (…, gates * H).
        state: For single steps, (…, H) each.
        from_hidden: W_h h + b' of each layer.
        from_below: W_x x + b of each layer after the first, whose input is the h below.
        dropout: Applied to the h that goes up to the next layer.

    Returns:
        The new state.
    """
    per_layer = states_per_layer(cell)
    new_state: list[Tensor] = []
    for number, project_hidden in enumerate(from_hidden):
        layer_state = state[number * per_layer : (number + 1) * per_layer]
        if number:
            projected = from_below[number - 1](dropout(new_state[-per_layer]))
        new_state += CELL_STEPS[cell](projected, project_hidden(layer_state[0]), layer_state, None)
    return tuple(new_state)


class CellStack(nn.Module):
    """Recurrent layers on top of each other, for single steps.

    The caller has the first layer's input weights, made by ``input_projections``.

    Args:
        cell: One of ``CELLS``.
        hidden_size: H.
        layers: L.
        dropout: Share of units dropped between the layers.
        initialisation: Of the recurrent weights, one of ``INITIALISATIONS``.
        forget_bias: What the bias of the LSTM's forget gate begins with.
    """

    def __init__(
        self,
        cell: str,
        hidden_size: int,
        layers: int = 1,
        dropout: float = 0.0,
        initialisation: str = "orthogonal",
        forget_bias: float = 1.0,
    ) -> None:
        super().__init__()
        self.cell, self.hidden_size, self.forget_bias = cell, hidden_size, forget_bias
        gates = GATE_COUNTS[cell] * hidden_size
        from_hidden = [nn.Linear(hidden_size, gates) for _ in range(layers)]
        for layer in from_hidden:
            _initialise_gates(layer.weight, hidden_size, INITIALISATIONS[initialisation])
            nn.init.zeros_(layer.bias)
        self.from_hidden = nn.ModuleList(from_hidden)
        self.from_below = nn.ModuleList(
            self.input_projections(hidden_size)[0] for _ in range(layers - 1)
        )
        self.dropout = nn.Dropout(dropout)

    def input_projections(self, *sizes: int) -> list[nn.Linear]:
        """Return W_x of a layer, cut into one linear layer for each part of its input.

        Args:
            sizes: Widths of the parts. The first one's layer has the bias b.
        """
        gates = GATE_COUNTS[self.cell] * self.hidden_size
        whole = nn.Linear(sum(sizes), gates)
        _initialise_gates(whole.weight, self.hidden_size, nn.init.xavier_uniform_)
        _initialise_bias(whole.bias, self.cell, self.hidden_size, self.forget_bias)
        parts = [nn.Linear(size, gates, bias=not place) for place, size in enumerate(sizes)]
        with torch.no_grad():
            parts[0].bias.copy_(whole.bias)
            for part, columns in zip(parts, whole.weight.split(list(sizes), 1), strict=True):
                part.weight.copy_(columns)
        return parts

    def step(self, projected: Tensor, state: State) -> State:
        """Take one step: see ``step_layers``."""
        return step_layers(
            self.cell, projected, state, list(self.from_hidden), list(self.from_below), self.dropout
        )


@dataclass(frozen=True)
class Unrolled:
    """A run of a stack, step by step.

    Attributes:
        outputs: h of the top layer at every step, (rows, T, H).
        state: The last state, (L, rows, H) each.
        hidden: For each layer its h at each step, (rows, H), as the graph holds them.
        gates: For each layer its gate activations by name, (rows, T, H): see ``CELL_STEPS``.
    """

    outputs: Tensor
    state: State
    hidden: list[list[Tensor]]
    gates: list[dict[str, Tensor]]


class RecurrentStack(nn.Module):
    """Recurrent layers on top of each other, over whole sequences; the weights are those of torch.

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
    ) -> None:
        super().__init__()
        self.cell, self.hidden_size = cell, hidden_size
        self.return_sequences, self.return_state = return_sequences, return_state
        self.fused = _fused_module(cell, input_size, hidden_size, layers, dropout)
        for input_weight, input_bias, weight, bias in self.layer_weights():
            _initialise_gates(input_weight, hidden_size, nn.init.xavier_uniform_)
            _initialise_bias(input_bias, cell, hidden_size, forget_bias)
            _initialise_gates(weight, hidden_size, INITIALISATIONS[initialisation])
            nn.init.zeros_(bias)

    @property
    def depth(self) -> int:
        """How many layers."""
        return self.fused.num_layers

    def layer_weights(self) -> list[tuple[Tensor, ...]]:
        """Return of each layer W_x (gates * H, D), its bias, W_h (gates * H, H) and its bias."""
        names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
        return [
            tuple(getattr(self.fused, f"{name}_l{number}") for name in names)
            for number in range(self.depth)
        ]

    def project(self, x: Tensor) -> Tensor:
        """Return W_x x + b of the first layer: (…, D) gives (…, gates * H)."""
        weight, bias, *_ = self.layer_weights()[0]
        return linear(x, weight, bias)

    def step(self, projected: Tensor, state: State) -> State:
        """Take one step by the equations: see ``step_layers``."""
        weights = self.layer_weights()
        return step_layers(
            self.cell,
            projected,
            state,
            [partial(linear, weight=layer[2], bias=layer[3]) for layer in weights],
            [partial(linear, weight=layer[0], bias=layer[1]) for layer in weights[1:]],
            partial(nn.functional.dropout, p=self.fused.dropout, training=self.training),
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
        """
        window = bptt_window or x.shape[1]
        outputs = []
        for start in range(0, x.shape[1], window):
            remaining = None if lengths is None else lengths - start
            part = x[:, start : start + window]
            window_output, state = self._run_window(part, state, remaining, start > 0)
            outputs.append(window_output)
        assert state is not None
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        output = whole if self.return_sequences else state[0][-1]
        return (output, state) if self.return_state else output

    def _run_window(
        self, x: Tensor, state: State | None, lengths: Tensor | None, cut: bool
    ) -> tuple[Tensor, State]:
        """Run over a window; with ``cut`` no gradient comes back from it to the state before."""
        if lengths is None:
            output, new = self.fused(x, _torch_state(state, cut))
            return output, new if isinstance(new, tuple) else (new,)
        state = self._zeros(x) if state is None else state
        active = (lengths > 0).nonzero().squeeze(1)
        if not len(active):
            return x.new_zeros((*x.shape[:2], self.hidden_size)), state
        packed = pack_padded_sequence(
            x[active],
            lengths[active].clamp(max=x.shape[1]).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        packed, new = self.fused(packed, _torch_state(tuple(p[:, active] for p in state), cut))
        new = new if isinstance(new, tuple) else (new,)
        output = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]
        outputs = output.new_zeros((len(x), *output.shape[1:])).index_copy(0, active, output)
        pairs = zip(state, new, strict=True)
        return outputs, tuple(old.to(n.dtype).index_copy(1, active, n) for old, n in pairs)

    def _zeros(self, x: Tensor) -> State:
        zeros = x.new_zeros((self.depth, len(x), self.hidden_size))
        return (zeros,) * states_per_layer(self.cell)

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
        initial = self._zeros(x) if state is None else state
        hidden: list[list[Tensor]] = []
        gates: list[dict[str, Tensor]] = []
        last_states: list[State] = []
        for number, weights in enumerate(self.layer_weights()):
            if number:
                x = nn.functional.dropout(x, self.fused.dropout, self.training)
            layer_state = tuple(part[number] for part in initial)
            steps, layer_gates, layer_state = self._unroll_layer(
                x, layer_state, weights, lengths, bptt_window
            )
            x = torch.stack(steps, 1)
            if lengths is not None:
                beyond = torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)
                x = x.masked_fill(beyond.unsqueeze(2), 0.0)
            hidden.append(steps)
            gates.append(layer_gates)
            last_states.append(layer_state)
        last = tuple(torch.stack(parts) for parts in zip(*last_states, strict=True))
        return Unrolled(x, last, hidden, gates)

    def _unroll_layer(
        self,
        x: Tensor,
        state: State,
        weights: tuple[Tensor, ...],
        lengths: Tensor | None,
        bptt_window: int,
    ) -> tuple[list[Tensor], dict[str, Tensor], State]:
        """Return one layer's h at each step, gates (rows, T, H) by name, and last state."""
        input_weight, input_bias, weight, bias = weights
        hidden: list[Tensor] = []
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
            hidden.append(state[0])
            gates.append(step_gates)
        stacked = {name: torch.stack([step[name] for step in gates], 1) for name in gates[0]}
        return hidden, stacked, state


def _torch_state(state: State | None, cut: bool) -> Tensor | State | None:
    """Give a state the form that torch.nn takes: a tuple for the LSTM, else the tensor alone."""
    if state is None:
        return None
    state = tuple(part.detach() for part in state) if cut else state
    return state[0] if len(state) == 1 else state


def _fused_module(
    cell: str, input_size: int, hidden_size: int, layers: int, dropout: float
) -> nn.RNNBase:
    sizes = (input_size, hidden_size, layers)
    dropout = dropout if layers > 1 else 0.0
    if cell == "lstm":
        return nn.LSTM(*sizes, batch_first=True, dropout=dropout)
    if cell == "gru":
        return nn.GRU(*sizes, batch_first=True, dropout=dropout)
    activation = cell.removeprefix("rnn_")
    return nn.RNN(*sizes, nonlinearity=activation, batch_first=True, dropout=dropout)


@torch.no_grad()
def _initialise_gates(
    weight: Tensor, hidden_size: int, initialise: Callable[[Tensor], Tensor]
) -> None:
    for gate in weight.split(hidden_size):
        initialise(gate)


@torch.no_grad()
def _initialise_bias(bias: Tensor, cell: str, hidden_size: int, forget_bias: float) -> None:
    """0, but for the LSTM's forget gate, which starts open (bias 1: Jozefowicz et al. 2015)."""
    bias.zero_()
    if cell == "lstm":
        bias.split(hidden_size)[1].fill_(forget_bias)  # torch's order: input, forget, cell, output
