"""The recurrent stack against its equations, and the equations against torch and by hand."""

import math
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captioner.models.recurrent import FUSED_KERNELS, RecurrentStack
from captioner.models.recurrent_cells import (
    CELL_STEPS,
    CELLS,
    GATE_COUNTS,
    INITIALISATIONS,
    CellStack,
    states_per_layer,
)

GATES = {
    "lstm": ["input", "forget", "candidate", "output"],
    "gru": ["reset", "update", "candidate"],
    "rnn_tanh": [],
    "rnn_relu": [],
}
LENGTHS = torch.tensor([6, 2, 4])
# How near the reference must be to torch's fused cells, in output and gradient.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make(cell: str, layers: int = 1, dtype: torch.dtype = torch.float64, **settings):
    """Return a stack D 5, H 7 that gives all there is, its biases away from 0."""
    torch.manual_seed(layers)
    settings = {"return_sequences": True, "return_state": True} | settings
    stack = RecurrentStack(cell, 5, 7, layers, **settings).to(dtype)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return stack


def start_of(stack: RecurrentStack, rows: int = 3, seed: int = 5):
    dtype = stack.fused.weight_hh_l0.dtype
    generator = torch.Generator().manual_seed(seed)
    layers = stack.depth * len(stack.directions)
    return tuple(
        torch.randn(layers, rows, 7, dtype=dtype, generator=generator, requires_grad=True)
        for _ in range(states_per_layer(stack.cell))
    )


def input_of(dtype: torch.dtype, steps: int = 6):
    generator = torch.Generator().manual_seed(9)
    return torch.randn(3, steps, 5, dtype=dtype, generator=generator, requires_grad=True)


def dot(numbers: list[float], others: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(numbers, others, strict=True))


def gradients(outputs, state, wanted):
    """Return the gradients of a sum that no two numbers share a weight in."""
    parts = [outputs, *state]
    weights = [torch.linspace(-1, 2, p.numel(), dtype=p.dtype).view_as(p).sin() for p in parts]
    total = sum((p * w).sum() for p, w in zip(parts, weights, strict=True))
    return torch.autograd.grad(total, wanted)


# --- the fused stack and the reference ----------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize("both", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize(("cell", "layers"), list(product(CELLS, [1, 2])))
def test_reference_equals_fused_in_output_and_gradient(cell, layers, both, lengths, dtype):
    stack, x = make(cell, layers, dtype, bidirectional=both), input_of(dtype)
    start = start_of(stack)
    outputs, state = stack(x, start, lengths)
    seen = stack.unroll(x, start, lengths)
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(seen.outputs, outputs, **close)
    torch.testing.assert_close(seen.state, state, **close)
    wanted = [x, *start, *stack.parameters()]
    expected = gradients(outputs, state, wanted)
    found = gradients(seen.outputs, seen.state, wanted)
    scale = max(1.0, *(float(g.abs().max()) for g in expected))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one / scale, other / scale, **close)


@pytest.mark.parametrize("cell", CELLS)
def test_reference_against_finite_differences(cell):
    stack, x = make(cell, 2), input_of(torch.float64, steps=4)
    start = start_of(stack)

    def run(x, *start):
        seen = stack.unroll(x, start, torch.tensor([4, 1, 3]))
        return seen.outputs, *seen.state

    assert torch.autograd.gradcheck(run, (x, *start))


@pytest.mark.parametrize("cell", CELLS)
def test_gates_are_those_of_the_equations(cell):
    """The state follows from the gates; the gates follow from the weights, one unit by hand."""
    stack, x = make(cell), input_of(torch.float64)
    (gates,) = (seen := stack.unroll(x)).gates
    assert list(gates) == GATES[cell]
    h = torch.stack([state[0] for state in seen.states[0]], 1)
    torch.testing.assert_close(h, seen.outputs)
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
    if cell == "lstm":
        i, f, g, o = gates.values()
        c = torch.zeros_like(i[:, 0])
        for t in range(6):
            c = f[:, t] * c + i[:, t] * g[:, t]
            torch.testing.assert_close(h[:, t], o[:, t] * c.tanh())
    elif cell == "gru":
        z, n = gates["update"], gates["candidate"]
        torch.testing.assert_close(h, (1 - z) * n + z * before)
    if gates:
        name, row = ("forget", 7) if cell == "lstm" else ("update", 7)
        weights = {n: p[row].tolist() for n, p in stack.fused.named_parameters()}
        by_hand = weights["bias_ih_l0"] + weights["bias_hh_l0"]
        by_hand += dot(x[1, 3].tolist(), weights["weight_ih_l0"])
        by_hand += dot(h[1, 2].tolist(), weights["weight_hh_l0"])
        assert gates[name][1, 3, 0].item() == pytest.approx(1 / (1 + math.exp(-by_hand)), abs=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_are_as_if_each_row_were_alone(cell):
    stack, x = make(cell, 2), input_of(torch.float64)
    outputs, state = stack(x, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone, last = stack(x[row : row + 1, :length])
        torch.testing.assert_close(outputs[row, :length], alone[0])
        assert not outputs[row, length:].any()
        for part, expected in zip(state, last, strict=True):
            torch.testing.assert_close(part[:, row], expected[:, 0])


def test_what_is_returned_is_as_in_keras():
    x = input_of(torch.float64)
    whole, (h, c) = make("lstm", 2)(x)
    assert whole.shape == (3, 6, 7)
    assert h.shape == c.shape == (2, 3, 7)
    torch.testing.assert_close(h[-1], whole[:, -1])
    last, _ = make("lstm", 2, return_sequences=False)(x)
    torch.testing.assert_close(last, whole[:, -1])
    alone = make("lstm", 2, return_sequences=False, return_state=False)(x, lengths=LENGTHS)
    torch.testing.assert_close(alone[1], whole[1, 1])
    assert isinstance(alone, torch.Tensor)
    for steps in (1, 50):  # the same weights at any length
        assert make("gru")(input_of(torch.float64, steps))[0].shape == (3, steps, 7)


def test_dropout_lies_between_layers_and_only_in_training():
    x = input_of(torch.float64)
    one, two = make("gru", 1, dropout=0.5), make("gru", 2, dropout=0.5)
    for run in ("forward", "unroll"):
        first = [getattr(stack, run)(x) for stack in (one, two)]
        second = [getattr(stack, run)(x) for stack in (one, two)]
        outputs = [
            [getattr(r, "outputs", r[0] if isinstance(r, tuple) else r) for r in each]
            for each in (first, second)
        ]
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert not torch.equal(outputs[0][1], outputs[1][1])
    two.eval()
    assert torch.equal(two(x)[0], two(x)[0])
    projected, state = torch.randn(4, 18), (torch.zeros(4, 6),) * 2
    stack = RecurrentStack("gru", 5, 6, 2, 0.5)
    for layers in (CellStack("gru", 6, 2, 0.5), stack):
        assert not torch.equal(layers.step(projected, state)[1], layers.step(projected, state)[1])
        layers.eval()
        assert torch.equal(layers.step(projected, state)[1], layers.step(projected, state)[1])


# --- in both directions -------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("cell", "layers"), list(product(CELLS, [1, 2])))
def test_a_bidirectional_stack_is_torchs(cell, layers, padded):
    """Output, state and gradient, where rows are padded against each row alone."""
    stack, x = make(cell, layers, bidirectional=True), input_of(torch.float64)
    assert isinstance(stack.fused, torch.nn.RNNBase)
    assert stack.fused.bidirectional
    start = start_of(stack)
    lengths = LENGTHS if padded else torch.tensor([6, 6, 6])
    outputs, states = [], []
    for row, length in enumerate(lengths.tolist()):
        begin = tuple(part[:, row : row + 1].contiguous() for part in start)
        output, state = stack.fused(
            x[row : row + 1, :length], begin if cell == "lstm" else begin[0]
        )
        outputs.append(torch.nn.functional.pad(output, (0, 0, 0, 6 - length)))
        states.append(state if cell == "lstm" else (state,))
    expected = torch.cat(outputs), [torch.cat(parts, 1) for parts in zip(*states, strict=True)]
    found = stack(x, start, LENGTHS if padded else None)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(found[0], expected[0], **close)
    torch.testing.assert_close(list(found[1]), expected[1], **close)
    wanted = [x, *start, *stack.parameters()]
    pairs = zip(gradients(*found, wanted), gradients(*expected, wanted), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_a_bidirectional_stack_ends_at_both_ends():
    """As in Keras: the last h is the forward one at the last step, the backward one at step 0."""
    x = input_of(torch.float64)
    stack = make("gru", 2, bidirectional=True)
    whole, (state,) = stack(x, lengths=LENGTHS)
    assert whole.shape == (3, 6, 14)
    assert stack.output_size == 14
    assert state.shape == (4, 3, 7)
    assert not whole[1, 2:].any()
    stack.return_sequences = stack.return_state = False
    last = stack(x, lengths=LENGTHS)
    ends = torch.stack([whole[row, length - 1, :7] for row, length in enumerate(LENGTHS)])
    torch.testing.assert_close(last[:, :7], ends)
    torch.testing.assert_close(last[:, 7:], whole[:, 0, 7:])
    forward, backward = stack.unroll(x, lengths=LENGTHS).states[2:]
    torch.testing.assert_close(torch.cat([forward[-1][0], backward[-1][0]], 1), last)


def test_what_follows_is_seen_in_both_directions_alone():
    x = input_of(torch.float64)
    other = torch.cat([x[:, :-1], x[:, -1:] + 1], 1)
    for both in (False, True):
        stack = make("lstm", bidirectional=both)
        same = torch.allclose(stack(x)[0][:, 0], stack(other)[0][:, 0], rtol=0, atol=1e-9)
        assert same != both


def test_what_a_bidirectional_stack_cannot_do_is_an_error():
    stack, x = make("gru", bidirectional=True), input_of(torch.float64)
    for run in (stack, stack.unroll):
        with pytest.raises(ValueError, match="bptt_window=2 can't cut a bidirectional stack"):
            run(x, bptt_window=2)
    with pytest.raises(ValueError, match="takes no single steps"):
        stack.step(stack.project(x[:, 0]), (torch.zeros(3, 7),) * 2)


# --- bfloat16 -----------------------------------------------------------------------------------


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of all floating-point tensors that operators take or give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, output))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.found |= {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        return output


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize("cell", CELLS)
def test_under_autocast_all_is_bfloat16_and_gradients_are_those_of_float32(
    cell, lengths, monkeypatch
):
    """On CUDA autocast itself would take float16, so the kernels must run without it."""
    stack, x = make(cell, 2, torch.float32), input_of(torch.float32)
    start = start_of(stack)
    wanted = [x, *start, *stack.parameters()]
    expected = stack(x, start, lengths)
    autocast_in_kernel, in_kernel = [], Dtypes()
    kernel = FUSED_KERNELS[cell]

    def watched_kernel(*args):
        autocast_in_kernel.append(torch.is_autocast_enabled("cpu"))
        with in_kernel:
            return kernel(*args)

    monkeypatch.setitem(FUSED_KERNELS, cell, watched_kernel)
    with Dtypes() as everywhere, torch.autocast("cpu", torch.bfloat16):
        output = stack(x, start, lengths)
        gradients = torch.autograd.grad(output[0].float().sum(), wanted)
    assert autocast_in_kernel == [False]
    assert in_kernel.found == {torch.bfloat16}
    assert everywhere.found == {torch.bfloat16, torch.float32}
    assert output[0].dtype == torch.bfloat16
    torch.testing.assert_close(output[0].float(), expected[0], rtol=0.05, atol=0.05)
    exact = torch.autograd.grad(expected[0].sum(), wanted)
    for one, other in zip(gradients, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.03 * other.norm()


def test_float64_stays_float64_under_autocast():
    stack, x = make("lstm"), input_of(torch.float64)
    expected = stack(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stack(x)[0], expected)


# --- truncated back-propagation -----------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize(("cell", "layers"), list(product(CELLS, [1, 2])))
@pytest.mark.parametrize("window", [1, 2, 4, 6, 9])
def test_truncation_carries_the_state_and_cuts_the_graph(cell, layers, window, lengths):
    """Against a hand-cut run of bare torch modules; a window of the length or more is no cut."""
    stack, x = make(cell, layers), input_of(torch.float64)
    start = start_of(stack)
    wanted = [x, *start, *stack.parameters()]
    whole = stack(x, start, lengths)
    cut = stack(x, start, lengths, window)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)
    found = gradients(*cut, wanted)
    seen = stack.unroll(x, start, lengths, window)
    for one, other in zip(found, gradients(seen.outputs, seen.state, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    full = gradients(*whole, wanted)
    same = all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, full, strict=True))
    assert same == (window >= 6)
    if lengths is None:
        state = start if cell == "lstm" else start[0]
        pieces = []
        for begin in range(0, 6, window):
            if begin:
                state = tuple(s.detach() for s in state) if cell == "lstm" else state.detach()
            piece, state = stack.fused(x[:, begin : begin + window], state)
            pieces.append(piece)
        by_hand = gradients(torch.cat(pieces, 1), state if cell == "lstm" else (state,), wanted)
        for one, other in zip(found, by_hand, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cut_takes_nothing_from_rows_that_have_ended(cell):
    stack, x = make(cell, 2, return_sequences=False), input_of(torch.float64)
    h, state = stack(x, None, LENGTHS, 3)
    together = gradients(h, state, list(stack.parameters()))
    alone = [stack(x[row : row + 1, :length], None, None, 3) for row, length in enumerate(LENGTHS)]
    h = torch.cat([last for last, _ in alone])
    state = [torch.cat(parts, 1) for parts in zip(*(s for _, s in alone), strict=True)]
    apart = gradients(h, state, list(stack.parameters()))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


# --- how weights begin ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", INITIALISATIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_initial_weights(cell, name):
    """What recurs is as the setting says in each gate, biases are 0 but the forget gate's."""
    stack = RecurrentStack(cell, 5, 8, initialisation=name, forget_bias=2.5)
    cells = CellStack(cell, 8, 1, 0.0, name, forget_bias=2.5)
    word, context = cells.input_projections(2, 3)
    assert context.bias is None
    for weights, *biases in (
        (stack.fused.weight_hh_l0, stack.fused.bias_ih_l0, stack.fused.bias_hh_l0),
        (cells.from_hidden[0].weight, word.bias, cells.from_hidden[0].bias),
    ):
        for gate in weights.split(8):
            orthogonal = torch.allclose(gate @ gate.T, torch.eye(8), atol=1e-5)
            assert orthogonal == (name != "xavier")
            assert torch.equal(gate, torch.eye(8)) == (name == "identity")
            if name == "xavier":
                assert gate.abs().max() <= math.sqrt(6 / 16)
        expected = torch.zeros(len(biases[0]))
        if cell == "lstm":
            expected[8:16] = 2.5
        torch.testing.assert_close((biases[0] + biases[1]).detach(), expected)


def test_an_irnn_remembers_exactly_at_first():
    """Le et al. 2015: with the identity and no input, h stays what it is, and so does dL/dh."""
    stack = RecurrentStack("rnn_relu", 5, 8, initialisation="identity", return_state=True)
    begin = torch.rand(1, 2, 8, requires_grad=True)
    last, _ = stack(torch.zeros(2, 300, 5), (begin,))
    assert torch.equal(last, begin[0])
    assert torch.equal(torch.autograd.grad(last.sum(), begin)[0], torch.ones_like(begin))


@pytest.mark.parametrize("bias", [-1.0, 1.0, 4.0])
def test_the_forget_bias_is_how_slowly_an_lstm_forgets(bias):
    stack = RecurrentStack("lstm", 5, 8, return_state=True, forget_bias=bias)
    for parameter in (stack.fused.weight_ih_l0, stack.fused.weight_hh_l0):
        parameter.data.zero_()
    _, (_, c) = stack(torch.zeros(1, 10, 5), (torch.zeros(1, 1, 8), torch.ones(1, 1, 8)))
    torch.testing.assert_close(c, torch.sigmoid(torch.tensor(bias)).expand(1, 1, 8) ** 10)


# --- single steps -------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "layers"), list(product(CELLS, [1, 2])))
def test_single_steps_equal_the_fused_sequence(cell, layers):
    stack = make(cell, layers)
    cells = CellStack(cell, 7, layers).double()
    first, second = (part.double() for part in cells.input_projections(2, 3))
    with torch.no_grad():
        for number, (input_weight, input_bias, weight, bias) in enumerate(stack.layer_weights()):
            cells.from_hidden[number].load_state_dict({"weight": weight, "bias": bias})
            if number:
                below = {"weight": input_weight, "bias": input_bias}
                cells.from_below[number - 1].load_state_dict(below)
            else:
                first.load_state_dict({"weight": input_weight[:, :2], "bias": input_bias})
                second.load_state_dict({"weight": input_weight[:, 2:]})
    x, start = input_of(torch.float64), start_of(stack)
    state = tuple(part[number] for number in range(layers) for part in start)
    states = {stack: state, cells: state}
    outputs = {stack: [], cells: []}
    for t in range(6):
        projected = {
            stack: stack.project(x[:, t]),
            cells: first(x[:, t, :2]) + second(x[:, t, 2:]),
        }
        for each in outputs:
            states[each] = each.step(projected[each], states[each])
            outputs[each].append(states[each][-states_per_layer(cell)])
    for steps in outputs.values():
        torch.testing.assert_close(torch.stack(steps, 1), stack(x, start)[0], rtol=0, atol=1e-12)
    last = stack(x, start)[1]
    columns = stack.stack_state(tuple(part.unsqueeze(1) for part in states[stack]))
    torch.testing.assert_close(columns, last, rtol=0, atol=1e-12)


def test_every_cell_has_its_equations():
    assert set(CELL_STEPS) == set(GATE_COUNTS) == set(CELLS)
