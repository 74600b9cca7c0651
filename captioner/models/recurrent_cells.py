"""Recurrent cells: the equations of one step, and layers of them for single steps.

All take the input of a step as the first layer's weights have made it, W_x x + b: what is known
beforehand is multiplied once. ``models.recurrent`` has whole sequences.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from captioner.models.dropout import Dropout

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
KEEP_ALL: Layer = nn.Identity()  # a dropout that drops nothing


def step_layers(
    cell: str,
    projected: Tensor,
    state: State,
    from_hidden: Sequence[Layer],
    from_below: Sequence[Layer],
    dropout: Layer,
    recurrent_dropout: Layer,
) -> State:
    """Take one step through all layers.

    Args:
        cell: One of ``CELLS``.
        projected: W_x x + b of the first layer, (…, gates * H).
        state: For single steps, (…, H) each.
        from_hidden: W_h h + b' of each layer.
        from_below: W_x x + b of each layer after the first, whose input is the h below.
        dropout: Applied to the h that goes up to the next layer.
        recurrent_dropout: Applied to the h(t-1) that W_h takes, at each step anew; the state itself
            is kept whole, so that nothing is forgotten (Semeniuta et al. 2016).

    Returns:
        The new state.
    """
    per_layer = states_per_layer(cell)
    new_state: list[Tensor] = []
    for number, project_hidden in enumerate(from_hidden):
        layer_state = state[number * per_layer : (number + 1) * per_layer]
        if number:
            projected = from_below[number - 1](dropout(new_state[-per_layer]))
        hidden = project_hidden(recurrent_dropout(layer_state[0]))
        new_state += CELL_STEPS[cell](projected, hidden, layer_state, None)
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
        recurrent_dropout: Share of units dropped of the h that each layer takes from the step
            before.
    """

    def __init__(
        self,
        cell: str,
        hidden_size: int,
        layers: int = 1,
        dropout: float = 0.0,
        initialisation: str = "orthogonal",
        forget_bias: float = 1.0,
        recurrent_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.cell, self.hidden_size, self.forget_bias = cell, hidden_size, forget_bias
        gates = GATE_COUNTS[cell] * hidden_size
        from_hidden = [nn.Linear(hidden_size, gates) for _ in range(layers)]
        for layer in from_hidden:
            initialise_gates(layer.weight, hidden_size, INITIALISATIONS[initialisation])
            nn.init.zeros_(layer.bias)
        self.from_hidden = nn.ModuleList(from_hidden)
        self.from_below = nn.ModuleList(
            self.input_projections(hidden_size)[0] for _ in range(layers - 1)
        )
        self.dropout, self.recurrent_dropout = Dropout(dropout), Dropout(recurrent_dropout)

    def input_projections(self, *sizes: int) -> list[nn.Linear]:
        """Return W_x of a layer, cut into one linear layer for each part of its input.

        Args:
            sizes: Widths of the parts. The first one's layer has the bias b.
        """
        gates = GATE_COUNTS[self.cell] * self.hidden_size
        whole = nn.Linear(sum(sizes), gates)
        initialise_gates(whole.weight, self.hidden_size, nn.init.xavier_uniform_)
        initialise_bias(whole.bias, self.cell, self.hidden_size, self.forget_bias)
        parts = [nn.Linear(size, gates, bias=not place) for place, size in enumerate(sizes)]
        with torch.no_grad():
            parts[0].bias.copy_(whole.bias)
            for part, columns in zip(parts, whole.weight.split(list(sizes), 1), strict=True):
                part.weight.copy_(columns)
        return parts

    def step(self, projected: Tensor, state: State) -> State:
        """Take one step: see ``step_layers``."""
        return step_layers(
            self.cell,
            projected,
            state,
            list(self.from_hidden),
            list(self.from_below),
            self.dropout,
            self.recurrent_dropout,
        )


@torch.no_grad()
def initialise_gates(
    weight: Tensor, hidden_size: int, initialise: Callable[[Tensor], Tensor]
) -> None:
    """Apply ``initialise`` to the rows of each gate, in place."""
    for gate in weight.split(hidden_size):
        initialise(gate)


@torch.no_grad()
def initialise_bias(bias: Tensor, cell: str, hidden_size: int, forget_bias: float) -> None:
    """Set a bias to 0, but for the LSTM's forget gate (which opens with 1: Jozefowicz 2015)."""
    bias.zero_()
    if cell == "lstm":
        bias.split(hidden_size)[1].fill_(forget_bias)  # torch's order: input, forget, cell, output
