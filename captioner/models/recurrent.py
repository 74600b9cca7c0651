"""Recurrent layers by cell: torch.nn's fused ones for whole sequences, their equations for steps.

``RecurrentStack`` runs whole sequences, ``StepCells`` single steps in training, ``Stepper`` single
steps in search. The equations of each cell stand once, below "single steps"; ``unroll`` runs whole
sequences by them, equal to the fused ones in output and gradient, and shows the gates.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from captioner.models.packed_linear import PackedLinear

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")

# How the recurrent weights of each gate, (H, H), begin.
INITIALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonal": nn.init.orthogonal_,  # keeps the length of h (Saxe et al. 2014)
    "xavier": nn.init.xavier_uniform_,  # Glorot and Bengio 2010
    "identity": nn.init.eye_,  # with rnn_relu the IRNN (Le et al. 2015)
}

# The state of one layer, (rows, H) each: h, and for the LSTM also the cell state c. The state of
# a whole stack is the same with all layers in each tensor, (L, rows, H), as torch has it.
State = tuple[Tensor, ...]


def states_of(cell: str) -> int:
    """Return how many tensors a layer's state is: 2 for the LSTM (h and c), else 1."""
    return 2 if cell == "lstm" else 1


@dataclass(frozen=True)
class Unrolled:
    """A run of a stack, step by step.

    Attributes:
        outputs: h of the top layer at every step, (rows, T, H).
        state: The last state, (L, rows, H) each.
        hidden: For each layer its h at each step, (rows, H), as the graph holds them.
        gates: For each layer its gate activations by name, (rows, T, H): see ``STEPS``.
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
        self.cell = cell
        self.return_sequences, self.return_state = return_sequences, return_state
        self.fused = _fused(cell, input_size, hidden_size, layers, dropout)
        initialise(self.fused, cell, hidden_size, initialisation, forget_bias)
        self.trace: list[list[Tensor]] | None = None  # see ``traced``
        self.register_load_state_dict_pre_hook(_name_fused)

    @property
    def depth(self) -> int:
        """How many layers."""
        return self.fused.num_layers

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
        if self.trace is not None:
            unrolled = self.unroll(x, state, lengths, bptt_window)
            outputs, state = unrolled.outputs, unrolled.state
            for seen, hidden in zip(self.trace, unrolled.hidden, strict=True):
                seen += hidden
        else:
            outputs, state = self._in_windows(x, state, lengths, bptt_window or x.shape[1])
        output = outputs if self.return_sequences else state[0][-1]
        return (output, state) if self.return_state else output

    def _in_windows(
        self, x: Tensor, state: State | None, lengths: Tensor | None, window: int
    ) -> tuple[Tensor, State]:
        outputs = []
        for start in range(0, x.shape[1], window):
            left = None if lengths is None else lengths - start
            output, state = self._run_fused(x[:, start : start + window], state, left, start > 0)
            outputs.append(output)
        assert state is not None
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state

    def _run_fused(
        self, x: Tensor, state: State | None, lengths: Tensor | None, cut: bool
    ) -> tuple[Tensor, State]:
        """Run over a window; with ``cut`` no gradient comes back from it to the state before."""
        if lengths is None:
            output, new = self.fused(x, _for_torch(state, cut))
            return output, new if isinstance(new, tuple) else (new,)
        state = self._zeros(x) if state is None else state
        lasting = (lengths > 0).nonzero().squeeze(1)
        if not len(lasting):
            return x.new_zeros((*x.shape[:2], self.fused.hidden_size)), state
        packed = pack_padded_sequence(
            x[lasting],
            lengths[lasting].clamp(max=x.shape[1]).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        begin = _for_torch(tuple(part[:, lasting] for part in state), cut)
        packed, new = self.fused(packed, begin)
        new = new if isinstance(new, tuple) else (new,)
        output = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]
        outputs = output.new_zeros((len(x), *output.shape[1:])).index_copy(0, lasting, output)
        kept = zip(state, new, strict=True)
        return outputs, tuple(old.to(n.dtype).index_copy(1, lasting, n) for old, n in kept)

    def _zeros(self, x: Tensor) -> State:
        zeros = x.new_zeros((self.depth, len(x), self.fused.hidden_size))
        return (zeros,) * states_of(self.cell)

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
        step = STEPS[self.cell]
        before = self._zeros(x) if state is None else state
        hidden: list[list[Tensor]] = []
        gates: list[dict[str, Tensor]] = []
        after: list[State] = []
        for number, (input_weight, input_bias, weight, bias) in enumerate(layers_of(self.fused)):
            if number:
                x = nn.functional.dropout(x, self.fused.dropout, self.training)
            own = tuple(part[number] for part in before)
            of_steps: list[Tensor] = []
            gates_of_steps: list[dict[str, Tensor]] = []
            for t, from_input in enumerate(linear(x, input_weight, input_bias).unbind(1)):
                cut = bptt_window and t and t % bptt_window == 0
                begin = tuple(part.detach() for part in own) if cut else own
                said: dict[str, Tensor] = {}
                new = step(from_input, linear(begin[0], weight, bias), begin, said)
                if lengths is not None:  # a row that has ended keeps its state, and its gradient
                    real = (t < lengths).unsqueeze(1)
                    pairs = zip(new, own, strict=True)
                    new = tuple(torch.where(real, part, old) for part, old in pairs)
                own = new
                of_steps.append(own[0])
                gates_of_steps.append(said)
            x = torch.stack(of_steps, 1)
            if lengths is not None:
                beyond = torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)
                x = x.masked_fill(beyond.unsqueeze(2), 0.0)
            hidden.append(of_steps)
            names = gates_of_steps[0]
            gates.append(
                {name: torch.stack([s[name] for s in gates_of_steps], 1) for name in names}
            )
            after.append(own)
        last = tuple(torch.stack(parts) for parts in zip(*after, strict=True))
        return Unrolled(x, last, hidden, gates)


def _for_torch(state: State | None, cut: bool) -> Tensor | State | None:
    """Give a state the form that torch.nn takes: a tuple for the LSTM, else the tensor alone."""
    if state is None:
        return None
    state = tuple(part.detach() for part in state) if cut else state
    return state[0] if len(state) == 1 else state


def _name_fused(module: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    """Read weights that were saved when a decoder held torch.nn's module itself."""
    for name, _parameter in module.get_submodule("fused").named_parameters():
        if prefix + name in state_dict:
            state_dict[f"{prefix}fused.{name}"] = state_dict.pop(prefix + name)


def _fused(cell: str, input_size: int, hidden_size: int, layers: int, dropout: float) -> nn.RNNBase:
    sizes = (input_size, hidden_size, layers)
    dropout = dropout if layers > 1 else 0.0
    if cell == "lstm":
        return nn.LSTM(*sizes, batch_first=True, dropout=dropout)
    if cell == "gru":
        return nn.GRU(*sizes, batch_first=True, dropout=dropout)
    activation = cell.removeprefix("rnn_")
    return nn.RNN(*sizes, nonlinearity=activation, batch_first=True, dropout=dropout)


class StepCells(nn.Module):
    """Cells on top of each other, taking one step at a time.

    Args:
        cell: One of ``CELLS``.
        input_size: D, width of the input of the first layer.
        hidden_size: H.
        layers: How many.
        dropout: Dropped between the layers.
        initialisation, forget_bias: As in ``RecurrentStack``.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        layers: int,
        dropout: float,
        initialisation: str = "orthogonal",
        forget_bias: float = 1.0,
    ) -> None:
        super().__init__()
        self.cell = cell
        sizes = [input_size] + [hidden_size] * (layers - 1)
        self.layers = nn.ModuleList(_step_cell(cell, size, hidden_size) for size in sizes)
        for layer in self.layers:
            initialise(layer, cell, hidden_size, initialisation, forget_bias)
        self.dropout = nn.Dropout(dropout)
        self.trace: list[list[Tensor]] | None = None  # see ``traced``

    @property
    def depth(self) -> int:
        """How many layers."""
        return len(self.layers)

    def forward(self, x: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Take one step.

        Args:
            x: (rows, D).
            states: For each layer its state, tensors of (rows, H).

        Returns:
            The last layer's h, (rows, H), and the new states.
        """
        new_states: list[State] = []
        for number, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            x = self.dropout(x) if number else x
            new = layer(x, state) if self.cell == "lstm" else (layer(x, state[0]),)
            new_states.append(new)
            x = new[0]
            if self.trace is not None:
                self.trace[number].append(x)
        return x, new_states


def _step_cell(cell: str, input_size: int, hidden_size: int) -> nn.RNNCellBase:
    if cell == "lstm":
        return nn.LSTMCell(input_size, hidden_size)
    if cell == "gru":
        return nn.GRUCell(input_size, hidden_size)
    return nn.RNNCell(input_size, hidden_size, nonlinearity=cell.removeprefix("rnn_"))


@torch.no_grad()
def initialise(
    module: nn.Module,
    cell: str,
    hidden_size: int,
    initialisation: str = "orthogonal",
    forget_bias: float = 1.0,
) -> None:
    """Xavier for what comes in, ``initialisation`` for what recurs, biases 0, gate by gate.

    The LSTM's forget gate starts open (bias 1: Jozefowicz et al. 2015) unless told otherwise.
    """
    for name, parameter in module.named_parameters():
        gates = parameter.split(hidden_size)
        if "weight_ih" in name:
            for gate in gates:
                nn.init.xavier_uniform_(gate)
        elif "weight_hh" in name:
            for gate in gates:
                INITIALISATIONS[initialisation](gate)
        else:
            parameter.zero_()
            if cell == "lstm" and "bias_ih" in name:
                gates[1].fill_(forget_bias)  # torch orders the gates input, forget, cell, output


# --- gradient flow ----------------------------------------------------------------------------


@contextlib.contextmanager
def traced(recurrence: RecurrentStack | StepCells) -> Iterator[list[list[Tensor]]]:
    """Keep h of every layer at every step, as the graph holds it, while the block runs.

    A ``RecurrentStack`` takes single steps meanwhile: what is between the steps of a fused module
    can't be seen.

    Yields:
        For each layer a list that grows by one (rows, H) a step.
    """
    recurrence.trace = [[] for _ in range(recurrence.depth)]
    try:
        yield recurrence.trace
    finally:
        recurrence.trace = None


def gradient_norms(loss: Tensor, hidden: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """Return how much of the loss's gradient reaches h at each step, |dL/dh(t)|, mean over rows.

    The derivative is the whole one: through the output of the step, and through all later steps
    (Pascanu et al. 2013, eq. 3-5). The graph is kept, no parameter's ``grad`` is touched.

    Args:
        loss: Sum of the losses of the rows.
        hidden: For each layer its h at each step, (rows, H), as ``traced`` or ``unroll`` gives.

    Returns:
        For each layer a norm for each step. 0 where the graph was cut.
    """
    flat = [h for of_layer in hidden for h in of_layer]
    gradients = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
    norms = iter(
        torch.stack(
            [
                loss.new_zeros(()) if each is None else each.norm(dim=-1).mean().to(loss.dtype)
                for each in gradients
            ]
        ).tolist()
    )
    return [[next(norms) for _ in of_layer] for of_layer in hidden]


# --- single steps -----------------------------------------------------------------------------
#
# Each takes what the input and what the last h give, W_xh x(t) + b and W_hh h(t-1) + b',
# (…, gates * H), and the state of the layer; it returns the new state. The gates are in torch's
# order. A dict, where one is given, is filled with the activations of the gates, (…, H).

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


STEPS: dict[str, Callable[[Tensor, Tensor, State, Gates | None], State]] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": tanh_step,
    "rnn_relu": relu_step,
}


def layers_of(recurrence: nn.RNNBase | StepCells) -> list[list[Tensor]]:
    """Return the weights of each layer: W_xh (gates * H, D), its bias, W_hh and its bias."""
    names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    if isinstance(recurrence, StepCells):
        return [[getattr(layer, name) for name in names] for layer in recurrence.layers]
    numbers = range(recurrence.num_layers)
    return [[getattr(recurrence, f"{name}_l{number}") for name in names] for number in numbers]


class Stepper:
    """The weights of a recurrence, in some dtype, for single steps without gradient.

    The input of the first layer is given as what its weights make of it, so that whoever knows
    the inputs beforehand, such as all words there are, can multiply them once.

    Args:
        recurrence: Whose weights.
        dtype: Of the copied weights.

    Attributes:
        input_weight, input_bias: Of the first layer: (gates * H, D), (gates * H,).
    """

    def __init__(self, recurrence: RecurrentStack | StepCells, dtype: torch.dtype) -> None:
        self._step, self._states = STEPS[recurrence.cell], states_of(recurrence.cell)
        layers = layers_of(recurrence if isinstance(recurrence, StepCells) else recurrence.fused)
        self.input_weight, self.input_bias = (part.detach().to(dtype) for part in layers[0][:2])
        self._from_below = [PackedLinear(layer[0], layer[1], dtype) for layer in layers[1:]]
        self._from_hidden = [PackedLinear(layer[2], layer[3], dtype) for layer in layers]

    def step(self, from_input: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take one step.

        Args:
            from_input: The first layer's input times ``input_weight`` plus ``input_bias``,
                (…, gates * H).
            states: For each layer its h, or h and c, (…, H); the last layer's come last.

        Returns:
            The new states.
        """
        new: list[Tensor] = []
        for number, from_hidden in enumerate(self._from_hidden):
            own = tuple(states[number * self._states : (number + 1) * self._states])
            if number:
                from_input = self._from_below[number - 1](new[-self._states])
            new += self._step(from_input, from_hidden(own[0]), own, None)
        return tuple(new)
