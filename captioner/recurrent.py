"""Recurrent cells by name: torch.nn's own for whole sequences, their equations for single steps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from captioner.linear import PackedLinear

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")

# The state of one layer: h, and for the LSTM also the cell state c.
State = tuple[Tensor, ...]


def states_of(cell: str) -> int:
    """Return how many tensors a layer's state is: 2 for the LSTM (h and c), else 1."""
    return 2 if cell == "lstm" else 1


def sequence_module(
    cell: str, input_size: int, hidden_size: int, layers: int, dropout: float
) -> nn.RNNBase:
    """Return torch's fused recurrence over whole sequences: (rows, T, D) -> (rows, T, H)."""
    dropout = dropout if layers > 1 else 0.0
    module: nn.RNNBase
    if cell == "lstm":
        module = nn.LSTM(input_size, hidden_size, layers, batch_first=True, dropout=dropout)
    elif cell == "gru":
        module = nn.GRU(input_size, hidden_size, layers, batch_first=True, dropout=dropout)
    else:
        module = nn.RNN(
            input_size,
            hidden_size,
            layers,
            nonlinearity=cell.removeprefix("rnn_"),
            batch_first=True,
            dropout=dropout,
        )
    initialise(module, cell, hidden_size)
    return module


class StepCells(nn.Module):
    """Cells on top of each other, taking one step at a time.

    Args:
        cell: One of ``CELLS``.
        input_size: D, width of the input of the first layer.
        hidden_size: H.
        layers: How many.
        dropout: Dropped between the layers.
    """

    def __init__(
        self, cell: str, input_size: int, hidden_size: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.cell = cell
        sizes = [input_size] + [hidden_size] * (layers - 1)
        self.layers = nn.ModuleList(_step_cell(cell, size, hidden_size) for size in sizes)
        self.dropout = nn.Dropout(dropout)

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
        return x, new_states


def _step_cell(cell: str, input_size: int, hidden_size: int) -> nn.RNNCellBase:
    module: nn.RNNCellBase
    if cell == "lstm":
        module = nn.LSTMCell(input_size, hidden_size)
    elif cell == "gru":
        module = nn.GRUCell(input_size, hidden_size)
    else:
        module = nn.RNNCell(input_size, hidden_size, nonlinearity=cell.removeprefix("rnn_"))
    initialise(module, cell, hidden_size)
    return module


@torch.no_grad()
def initialise(module: nn.Module, cell: str, hidden_size: int) -> None:
    """Xavier for what comes in, orthogonal for what recurs, biases 0.

    The LSTM's forget gate starts open (bias 1: Jozefowicz et al. 2015).
    """
    for name, parameter in module.named_parameters():
        gates = parameter.split(hidden_size)
        if "weight_ih" in name:
            for gate in gates:
                nn.init.xavier_uniform_(gate)
        elif "weight_hh" in name:
            for gate in gates:
                nn.init.orthogonal_(gate)
        else:
            parameter.zero_()
            if cell == "lstm" and "bias_ih" in name:
                gates[1].fill_(1.0)  # torch orders the gates input, forget, cell, output


# --- single steps -----------------------------------------------------------------------------
#
# Each takes what the input and what the last h give, W x + b and U h + b', (…, gates * H), and the
# state of the layer; it returns the new state. The gates are in torch's order.


def lstm_step(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Take a step of the LSTM (Hochreiter and Schmidhuber 1997, with Gers's forget gate)."""
    i, f, g, o = (from_input + from_hidden).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Take a step of the GRU (Cho et al. 2014, with the reset gate after the product)."""
    reset, update, new = from_input.chunk(3, -1)
    from_reset, from_update, from_new = from_hidden.chunk(3, -1)
    r, z = torch.sigmoid(reset + from_reset), torch.sigmoid(update + from_update)
    n = torch.tanh(new + r * from_new)
    return ((1 - z) * n + z * state[0],)


def tanh_step(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Take a step of the vanilla RNN (Elman 1990)."""
    return (torch.tanh(from_input + from_hidden),)


def relu_step(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Take a step of the vanilla RNN with rectified units (Le et al. 2015)."""
    return (torch.relu(from_input + from_hidden),)


STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": tanh_step,
    "rnn_relu": relu_step,
}


class Stepper:
    """The weights of a recurrence, in some dtype, for single steps without gradient.

    The input of the first layer is given as what its weights make of it, so that whoever knows
    the inputs beforehand, such as all words there are, can multiply them once.

    Args:
        recurrence: What ``sequence_module`` made, or ``StepCells``.
        cell: One of ``CELLS``.
        dtype: Of the copied weights.

    Attributes:
        input_weight, input_bias: Of the first layer: (gates * H, D), (gates * H,).
    """

    def __init__(self, recurrence: nn.RNNBase | StepCells, cell: str, dtype: torch.dtype) -> None:
        self._step, self._states = STEPS[cell], states_of(cell)
        names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
        if isinstance(recurrence, StepCells):
            layers = [[getattr(layer, name) for name in names] for layer in recurrence.layers]
        else:
            numbers = range(recurrence.num_layers)
            layers = [[getattr(recurrence, f"{name}_l{k}") for name in names] for k in numbers]
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
            new += self._step(from_input, from_hidden(own[0]), own)
        return tuple(new)
