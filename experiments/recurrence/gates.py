"""What each gate is worth: an LSTM and a GRU from which one is taken."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from captioner.metrics.report import new_figure
from captioner.models.recurrent import RecurrentStack
from captioner.models.recurrent_cells import CELL_STEPS, GATE_COUNTS, Gates
from captioner.progress import progress_iter
from experiments.recurrence.captions import pad_rows
from experiments.recurrence.memory import SOLVED, learn_to_add
from experiments.recurrence.pictures import Record, draw_dots
from experiments.recurrence.sequences import LanguageModel, language_captions, perplexity
from experiments.recurrence.study import Setting, batch_of, fit

CLOSED, HALF, OPEN = -40.0, 0.0, 40.0  # sigmoid(40) is 1 in float32, sigmoid(-40) 4e-18


class FixedGate(nn.Module):
    """Weights in which a gate doesn't depend on what comes in: its rows are one number.

    Args:
        hidden_size: H.
        gate: Which one, in torch's order.
        value: Of its rows, (H, …): a bias fixes the gate at sigmoid(value).
    """

    def __init__(self, hidden_size: int, gate: int, value: float) -> None:
        super().__init__()
        self.rows, self.value = slice(gate * hidden_size, (gate + 1) * hidden_size), value

    def forward(self, weight: Tensor) -> Tensor:
        """Return (gates * H, …) with these rows; they have no gradient."""
        fixed = weight.clone()
        fixed[self.rows] = self.value
        return fixed


class CoupledGates(nn.Module):
    """Weights of an LSTM that forgets as much as it takes in, f = 1 - i = sigmoid(-W_i x …)."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return (4H, …), the forget gate's rows those of the input gate times -1."""
        i, _, g, o = weight.chunk(4)
        return torch.cat([i, -i, g, o])


class LinearOutput(RecurrentStack):
    """An LSTM of one layer without the last tanh, h = o * c; step by step."""

    def forward(self, x: Tensor, *unused: Any, **none: Any) -> Tensor:
        """Run over whole sequences from zeros, (rows, T, D); it takes nothing else."""
        _, _, weight, bias = self.layer_weights()[0]
        h = c = x.new_zeros((len(x), self.hidden_size))
        outputs = []
        for projected in self.project(x).unbind(1):
            gates: Gates = {}
            from_hidden = nn.functional.linear(h, weight, bias)
            _, c = CELL_STEPS["lstm"](projected, from_hidden, (h, c), gates)
            h = gates["output"] * c
            outputs.append(h)
        return torch.stack(outputs, 1) if self.return_sequences else h


# The cell, the gate that is fixed (in torch's order) and at what; or what else is changed.
VARIANTS: dict[str, tuple[str, tuple[int, float] | str]] = {
    "lstm": ("lstm", ""),
    "lstm, input gate 1": ("lstm", (0, OPEN)),
    "lstm, forget gate 1": ("lstm", (1, OPEN)),
    "lstm, forget gate 0": ("lstm", (1, CLOSED)),
    "lstm, output gate 1": ("lstm", (3, OPEN)),
    "lstm, forget = 1 - input": ("lstm", "coupled"),
    "lstm, no tanh after c": ("lstm", "linear output"),
    "gru": ("gru", ""),
    "gru, reset gate 1": ("gru", (0, OPEN)),
    "gru, update gate 0.5": ("gru", (1, HALF)),
    "gru, update gate 0": ("gru", (1, CLOSED)),
}


def make_variant(name: str, input_size: int, units: int, sequences: bool = False) -> RecurrentStack:
    """Return one of ``VARIANTS``; what is fixed or follows from other weights isn't trained."""
    cell, change = VARIANTS[name]
    kind = LinearOutput if change == "linear output" else RecurrentStack
    stack = kind(cell, input_size, units, return_sequences=sequences)
    for weight in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        if isinstance(change, tuple):
            gate, value = change
            fixed = FixedGate(units, gate, value if weight == "bias_ih_l0" else 0.0)
            parametrize.register_parametrization(stack.fused, weight, fixed)
        elif change == "coupled":
            parametrize.register_parametrization(stack.fused, weight, CoupledGates())
    return stack


def trained_weights(stack: RecurrentStack) -> int:
    """Return how many weights of a variant are trained."""
    total = sum(parameter.numel() for parameter in stack.parameters())
    count = GATE_COUNTS[stack.cell]
    return total - total // count if parametrize.is_parametrized(stack.fused) else total


def gates(setting: Setting) -> list[Record]:
    """What each gate is worth: LSTM and GRU with one gate taken away.

    As in Greff et al. 2017 (LSTM: a search space odyssey), on two tasks: the adding problem over
    50 steps (64 units, batches of 32, Adam at 0.01, a run ends when the mean squared error over 20
    batches is below 0.02; `error` is that mean at the end, whoever always says 1 has 0.167,
    `batches` how many it took) and the next word of captions after few batches (`perplexity`, 128
    units). A gate is fixed at a number by its weights, 0, and its bias; or forgets what the other
    takes in; or the tanh between c and h is left out. `weights` are the recurrence's that are
    trained on the adding problem.
    """
    records: list[Record] = []
    combinations = list(product(VARIANTS, setting.seeds))
    for name, seed in progress_iter(combinations, "gates", len(combinations), "run"):
        make = partial(make_variant, name, 2, 64)
        history = learn_to_add(make, 50, 0.01, seed, setting.pick(1000, 5))
        records.append(
            {
                "model": name,
                "seed": seed,
                "weights": trained_weights(make()),
                "error": history.error,
                "solved": float(history.is_below(SOLVED)),
                "batches": len(history.losses),
                "perplexity": _train_words(name, seed, setting),
            }
        )
    return records


def _train_words(name: str, seed: int, setting: Setting) -> float:
    captions, held_out, size = language_captions(setting, setting.pick(1000, 40))
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    hidden: Callable[..., nn.Module] = partial(make_variant, name, sequences=True)
    model = LanguageModel(hidden, size)

    def loss_of(_: int) -> Tensor:
        return model.loss(pad_rows([captions[i] for i in batch_of(len(captions), random, 32)])[0])

    fit(model, loss_of, setting.pick(250, 5), torch.optim.Adam(model.parameters(), lr=2e-3))
    with torch.no_grad():
        return perplexity(model, held_out)


def draw_gates(records: Sequence[Record]) -> Any:
    """Draw error and perplexity of each variant."""
    figure = new_figure(2, 1, 4.4, 4.0)
    labels = {"error": "adding 50 steps: mean squared error", "perplexity": "next word: perplexity"}
    for place, (name, label) in enumerate(labels.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        draw_dots(axes, records, "model", name, label)
        if name == "error":
            axes.axvline(1 / 6, color="0.3", linestyle=":", linewidth=0.9)
            axes.text(1 / 6, -0.6, "always 1", ha="center", fontsize="x-small", color="0.3")
    return figure
