"""What each cell costs."""

import statistics
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from captioner.metrics.report import new_figure
from captioner.models.recurrent import RecurrentStack
from captioner.models.recurrent_cells import CELLS
from captioner.progress import progress_iter
from experiments.recurrence.pictures import Record, draw_lines
from experiments.recurrence.study import Setting


def cost(setting: Setting) -> list[Record]:
    """Parameters, time and memory of each cell.

    One layer, as wide as its input, 64 sequences of 20 steps, float32: milliseconds of forward
    and backward together (the median of repetitions, the cells taken in turn so that all of them
    meet the same machine), microseconds of a step of search for 64 hypotheses, where what comes in
    is looked up (`RecurrentStack.step`), and what is kept in memory for the backward pass.
    `time_of_lstm`, `step_of_lstm` and `parameters_of_lstm` are shares of the LSTM's.
    """
    widths = setting.pick((64, 128, 256, 512), (16,))
    repetitions = setting.pick(15, 2)
    records: list[Record] = []
    combinations = list(product(setting.seeds, widths))
    for seed, width in progress_iter(combinations, "cost", len(combinations), "round"):
        torch.manual_seed(seed)
        x = torch.randn(64, 20, width, requires_grad=True)
        stacks = {cell: RecurrentStack(cell, width, width) for cell in CELLS}
        times: dict[str, list[float]] = {cell: [] for cell in CELLS}
        steps: dict[str, list[float]] = {cell: [] for cell in CELLS}
        for _ in range(repetitions + 1):  # the first warms up
            for cell, stack in stacks.items():
                times[cell].append(_seconds_of_training(stack, x))
                steps[cell].append(_seconds_of_a_step(stack))
        medians = {cell: statistics.median(values[1:]) for cell, values in times.items()}
        of_steps = {cell: statistics.median(values[1:]) for cell, values in steps.items()}
        parameters = {c: sum(p.numel() for p in s.parameters()) for c, s in stacks.items()}
        for cell, stack in stacks.items():
            records.append(
                {
                    "width": width,
                    "cell": cell,
                    "seed": seed,
                    "parameters": parameters[cell],
                    "milliseconds": 1000 * medians[cell],
                    "microseconds_of_a_step": 1e6 * of_steps[cell],
                    "megabytes": _kept_for_backward(stack, x) / 1e6,
                    "time_of_lstm": medians[cell] / medians["lstm"],
                    "step_of_lstm": of_steps[cell] / of_steps["lstm"],
                    "parameters_of_lstm": parameters[cell] / parameters["lstm"],
                }
            )
    return records


def draw_cost(records: Sequence[Record]) -> Any:
    """Draw time and memory over the width, a line for each cell."""
    figure = new_figure(3, 1, 3.4, 3.0)
    labels = {
        "milliseconds": "forward and backward, ms",
        "time_of_lstm": "the same, share of the LSTM's",
        "megabytes": "kept for backward, MB",
    }
    for place, (name, label) in enumerate(labels.items()):
        axes = figure.add_subplot(1, 3, place + 1)
        axes.set_yscale("linear" if name == "time_of_lstm" else "log")
        draw_lines(axes, records, "width", name, ("cell",), marker=".")
        axes.set(ylabel=label, xlabel="width, units")
    return figure


def _seconds_of_training(stack: RecurrentStack, x: Tensor) -> float:
    started = time.perf_counter()
    stack(x).sum().backward()
    return time.perf_counter() - started


@torch.no_grad()
def _seconds_of_a_step(stack: RecurrentStack, rows: int = 64) -> float:
    projected = stack.project(torch.randn(rows, stack.hidden_size))
    state = stack.zero_state(projected)
    started = time.perf_counter()
    stack.step(projected, state)
    return time.perf_counter() - started


def _kept_for_backward(stack: RecurrentStack, x: Tensor) -> int:
    """Return the bytes of all tensors that a forward pass keeps, each storage counted once."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = stack(x)
    weights = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    total = sum(size for pointer, size in kept.items() if pointer not in weights)
    output.sum().backward()
    return total
