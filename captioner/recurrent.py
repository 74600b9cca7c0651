"""Recurrent cells by name, over torch.nn's own: whole sequences at once, or single steps."""

import torch
from torch import Tensor, nn

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
