"""The numbers of optimiser steps, which stay on the device until they are read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.training.distributed import Processes
from captioner.training.objectives import StepLoss


@dataclass(frozen=True)
class StepNumbers:
    """What an optimiser step of all processes was like.

    Attributes:
        number: Of the step, from 1.
        rate: The learning rate.
        images: Images.
        loss: The loss.
        norm: Norm of the gradient.
        tokens: Tokens.
        values: What else the objective tells.
    """

    number: int
    rate: float
    images: int
    loss: float
    norm: float
    tokens: int
    values: dict[str, float]


class UnreadSteps:
    """Steps that were taken, and whose numbers nobody has waited for yet.

    Args:
        processes: They take the steps together, and read the numbers at the same steps.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._taken: list[tuple[int, float, int, StepLoss, Tensor]] = []

    def add(self, number: int, rate: float, images: int, loss: StepLoss, norm: Tensor) -> None:
        """Keep a step: ``loss`` is this process's part, all else is of all processes."""
        self._taken.append((number, rate, images, loss, norm))

    def read(self) -> list[StepNumbers]:
        """Return the numbers of the steps since the last call; waits for the device once."""
        taken, self._taken = self._taken, []
        if not taken:
            return []
        on_device = [tensor for *_, loss, norm in taken for tensor in (loss.loss, norm)]
        with self._processes.watched():  # on a GPU the others' end shows here, too
            numbers = torch.stack(on_device).tolist()
        rows = [
            [own, loss.tokens, *loss.values.values()]
            for own, (*_, loss, _) in zip(numbers[::2], taken, strict=True)
        ]
        if self._processes.count > 1:
            rows = self._processes.sum(torch.tensor(rows, dtype=torch.float64)).tolist()
        return [
            StepNumbers(
                *(number, rate, images, total, norm, int(tokens)),
                dict(zip(loss.values, values, strict=True)),
            )
            for (number, rate, images, loss, _), norm, (total, tokens, *values) in zip(
                taken, numbers[1::2], rows, strict=True
            )
        ]
