"""StepCells step by step equals torch's fused recurrence, for every cell."""

import pytest
import torch
from torch import nn

from captioner.recurrent import CELLS, StepCells, sequence_module, states_of


def fused_of(cells: StepCells, cell: str, sizes: tuple[int, int]) -> nn.RNNBase:
    """Return torch's fused recurrence with the weights of the step cells."""
    fused = sequence_module(cell, *sizes, layers=len(cells.layers), dropout=0.0).double()
    with torch.no_grad():
        for number, layer in enumerate(cells.layers):
            for name, parameter in layer.named_parameters():
                getattr(fused, f"{name}_l{number}").copy_(parameter)
    return fused


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_equal_the_fused_sequence(cell, layers):
    torch.manual_seed(layers)
    cells = StepCells(cell, 5, 7, layers, dropout=0.0).double()
    fused = fused_of(cells, cell, (5, 7))
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    start = [torch.randn(layers, 3, 7, dtype=torch.float64) for _ in range(states_of(cell))]
    expected, _ = fused(x, tuple(start) if len(start) > 1 else start[0])

    states = [tuple(part[number] for part in start) for number in range(layers)]
    outputs = []
    for t in range(6):
        h, states = cells(x[:, t], states)
        outputs.append(h)
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=0, atol=1e-12)
    assert [len(state) for state in states] == [states_of(cell)] * layers


@pytest.mark.parametrize("cell", CELLS)
def test_initial_weights(cell):
    """Orthogonal recurrences of each gate, zero biases, and an LSTM that remembers at first."""
    module = StepCells(cell, 5, 8, 1, 0.0).layers[0]
    for gate in module.weight_hh.split(8):
        torch.testing.assert_close(gate @ gate.T, torch.eye(8), rtol=0, atol=1e-5)
    bias = (module.bias_ih + module.bias_hh).detach()
    expected = torch.zeros_like(bias)
    if cell == "lstm":
        expected[8:16] = 1.0
        # With no input, no output of the recurrence and a forget gate at sigmoid(1), c decays so.
        module.weight_ih.data.zero_()
        module.weight_hh.data.zero_()
        _, c = module(torch.zeros(1, 5), (torch.zeros(1, 8), torch.ones(1, 8)))
        torch.testing.assert_close(c, torch.sigmoid(torch.ones(1, 8)))
    torch.testing.assert_close(bias, expected)


def test_dropout_lies_between_layers_and_only_in_training():
    torch.manual_seed(0)
    x, states = torch.randn(4, 5), [(torch.zeros(4, 6),)] * 2
    one, two = StepCells("gru", 5, 6, 1, 0.5), StepCells("gru", 5, 6, 2, 0.5)
    assert torch.equal(one(x, states[:1])[0], one(x, states[:1])[0])
    assert not torch.equal(two(x, states)[0], two(x, states)[0])
    two.eval()
    assert torch.equal(two(x, states)[0], two(x, states)[0])
