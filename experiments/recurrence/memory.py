"""How far back a recurrence can learn, with which remedy, and with which window."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from captioner.metrics.report import new_figure
from captioner.models.recurrent import RecurrentStack
from captioner.progress import progress_iter
from experiments.recurrence.pictures import COLOURS, Record, draw_map, groups
from experiments.recurrence.study import History, LastStep, Setting, fit


def adding_problem(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the adding problem (Hochreiter and Schmidhuber 1997; Le et al. 2015, section 4.1).

    Returns:
        (rows, length, 2), numbers from 0 to 1 and marks on one of them in each half; and the sum
        of the marked ones, (rows, 1). Whoever always says 1 has a mean squared error of 1/6.
    """
    numbers = torch.rand(rows, length, generator=generator)
    half = length // 2
    first = torch.randint(half, (rows, 1), generator=generator)
    second = torch.randint(half, length, (rows, 1), generator=generator)
    marks = torch.zeros(rows, length).scatter_(1, torch.cat([first, second], 1), 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)


@dataclass(frozen=True)
class Remedy:
    """A cell, how it begins, and how its gradient is clipped.

    Attributes:
        cell: One of ``CELLS``.
        start: Of the recurrent weights, one of ``INITIALISATIONS``.
        forget_bias: What the bias of the LSTM's forget gate begins with.
        clip_value: Largest size of each number of the gradient; 0 clips to a norm of 1 instead.
    """

    cell: str
    start: str
    forget_bias: float = 0.0
    clip_value: float = 0.0


REMEDIES: dict[str, Remedy] = {
    "rnn_tanh, xavier": Remedy("rnn_tanh", "xavier"),
    "rnn_tanh, orthogonal": Remedy("rnn_tanh", "orthogonal"),
    "rnn_tanh, identity": Remedy("rnn_tanh", "identity"),
    "rnn_relu, orthogonal": Remedy("rnn_relu", "orthogonal"),
    "rnn_relu, identity (IRNN)": Remedy("rnn_relu", "identity"),
    "IRNN, clipped by value": Remedy("rnn_relu", "identity", clip_value=0.1),
    "gru, orthogonal": Remedy("gru", "orthogonal"),
    "lstm, forget bias 0": Remedy("lstm", "orthogonal", 0.0),
    "lstm, forget bias 1": Remedy("lstm", "orthogonal", 1.0),
    "lstm, forget bias 4": Remedy("lstm", "orthogonal", 4.0),
}
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
TUNING_SEED = 100  # none of the study's
BUDGET = 1000  # batches, for every remedy, rate and length
SOLVED = 0.02  # mean squared error, over the last 20 batches; always saying 1 has 0.167


def adding(setting: Setting) -> list[Record]:
    """The adding problem at 50 to 400 steps: who solves it, with which remedy.

    64 units, Adam, batches of 32, at most 1,000 of them for each remedy, rate and length; gradients
    are clipped to a norm of 1 or, where it says so, each of their numbers to 0.1. A run ends when
    the mean squared error over 20 batches is below 0.02, and dies when its loss is no finite
    number. `error` is that mean at the end; whoever always says 1 has 0.167. All remedies are tuned
    alike: five rates from 0.0003 to 0.03, over 50 and 100 steps, with a seed that isn't used again.
    The best rate, which a remedy then has at all lengths, solved more of the two; among equals, in
    fewer batches (an unsolved length counts 1,000); among equals again, it has the least error.
    """
    lengths = setting.pick((50, 100, 200, 400), (12, 20))
    rates = setting.pick(RATES, (0.001, 0.01))
    records: list[Record] = []
    for remedy in progress_iter(REMEDIES, "adding", len(REMEDIES), "remedy"):
        trials = [
            [_learn_to_add(setting, remedy, length, rate, TUNING_SEED) for length in lengths[:2]]
            for rate in rates
        ]
        rate = min(trials, key=rank_of_trial)[0]["rate"]
        tuning = [_summary_of_trial(trial) for trial in trials]
        for length, seed in product(lengths, setting.seeds):
            record = _learn_to_add(setting, remedy, length, rate, seed)
            records.append({**record, "tuning": tuning})
    return records


def rank_of_trial(runs: Sequence[Record]) -> tuple[int, int, float]:
    """Return what a rate is chosen by, the least first: the lengths that it left unsolved.

    Then the batches, of which an unsolved length counts its whole budget; then the mean error,
    which is infinite where a run died.
    """
    unsolved = sum(not run["solved"] for run in runs)
    batches = sum(run["steps"] if run["solved"] else BUDGET for run in runs)
    errors = [math.inf if run["error"] is None else run["error"] for run in runs]
    return unsolved, batches, statistics.fmean(errors)


def _summary_of_trial(runs: Sequence[Record]) -> Record:
    unsolved, batches, error = rank_of_trial(runs)
    shown = error if math.isfinite(error) else None
    return {"rate": runs[0]["rate"], "unsolved": unsolved, "batches": batches, "error": shown}


def _learn_to_add(setting: Setting, name: str, length: int, rate: float, seed: int) -> Record:
    remedy = REMEDIES[name]
    make = partial(
        RecurrentStack,
        remedy.cell,
        2,
        64,
        initialisation=remedy.start,
        forget_bias=remedy.forget_bias,
    )
    clips = (0.0, remedy.clip_value) if remedy.clip_value else (1.0, 0.0)
    history = learn_to_add(make, length, rate, seed, setting.pick(BUDGET, 5), *clips)
    solved = history.is_below(SOLVED)
    return {
        "remedy": name,
        "cell": remedy.cell,
        "length": length,
        "rate": rate,
        "seed": seed,
        "solved": float(solved),
        "died": float(history.diverged),
        "steps": len(history.losses),
        "steps_if_solved": len(history.losses) if solved else None,
        "error": history.error,
    }


def learn_to_add(
    make: Callable[[], RecurrentStack],
    length: int,
    rate: float,
    seed: int,
    budget: int,
    clip: float = 1.0,
    clip_value: float = 0.0,
) -> History:
    """Train a network on batches of 32 of the adding problem, until it is solved or over.

    Args:
        make: Makes what reads, two numbers a step.
        length: Steps.
        rate: Of Adam.
        seed: Of the network and of the batches.
        budget: Batches at most.
        clip: As in ``fit``.
        clip_value: As in ``fit``.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = LastStep(1, make())

    def loss_of(_: int) -> Tensor:
        x, y = adding_problem(32, length, generator)
        return mse_loss(model(x), y)

    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    return fit(model, loss_of, budget, optimizer, clip, clip_value, lambda h: h.is_below(SOLVED))


def draw_adding(records: Sequence[Record]) -> Any:
    """Draw how many seeds solved it as colour, after how many batches as numbers; the tuning too.

    A dash: no seed solved it; a cross for each run that died.
    """
    figure = new_figure(2, 1, 5.2, 4.2)
    axes = figure.add_subplot(1, 2, 1)
    draw_map(axes, records, "length", "remedy", "solved", "steps_if_solved")
    axes.set(title="the study: batches until solved, ×: a run died", xlabel="length, steps")
    axes.set_ylabel("")
    trials, chosen = [], []
    for (remedy, rate), of_remedy in groups(records, ("remedy", "rate")).items():
        for row in of_remedy[0]["tuning"]:
            solved = 1 - row["unsolved"] / 2
            batches = row["batches"] if solved == 1 else None
            died = float(row["error"] is None)
            trials.append(
                {**row, "remedy": remedy, "solved": solved, "batches": batches, "died": died}
            )
        chosen.append([row["rate"] for row in of_remedy[0]["tuning"]].index(rate))
    axes = figure.add_subplot(1, 2, 2)
    draw_map(axes, trials, "rate", "remedy", "solved", "batches")
    for ink, width in (("black", 4), ("white", 1.5)):  # seen on each colour of the map
        frame = {"markersize": 22, "markerfacecolor": "none", "markeredgewidth": width}
        axes.plot(chosen, range(len(chosen)), "s", markeredgecolor=ink, **frame)
    axes.set(title="tuning at 50 and 100 steps, the chosen framed", xlabel="learning rate")
    axes.set(ylabel="", yticks=[])
    return figure


SYMBOLS = 8


def recall_problem(rows: int, span: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences whose first symbol must be named after ``span`` steps of others.

    The simplest case of the copying task (Hochreiter and Schmidhuber 1997).

    Returns:
        (rows, span + 1, 2 * 8), one of 8 symbols first, then any of 8 others; the first, (rows,).
    """
    first = torch.randint(SYMBOLS, (rows, 1), generator=generator)
    others = torch.randint(SYMBOLS, 2 * SYMBOLS, (rows, span), generator=generator)
    return one_hot(torch.cat([first, others], 1), 2 * SYMBOLS).float(), first.squeeze(1)


def truncation(setting: Setting) -> list[Record]:
    """Truncation window against memory span.

    A network of 64 units must name the first symbol it read, out of 8, after so many steps of
    others; back-propagation goes back a window of steps, the state goes on. With a window shorter
    than the span no gradient tells the network to keep that symbol: the last steps' weights learn
    to read what the state happens to hold. `frozen` trains the output alone, and leaves the
    recurrent network as it began (an echo state network, Jaeger 2001). Guessing is right in 12.5%.
    """
    # With the first symbol 5, 10, 20 and 40 steps: whole windows, so that the last one, at whose
    # end the answer is, is a full one.
    spans = setting.pick((4, 9, 19, 39), (4,))
    windows = setting.pick(("frozen", "1", "5", "10", "20", "all"), ("frozen", "1", "all"))
    cells = setting.pick(("rnn_tanh", "gru", "lstm"), ("gru",))
    combinations = list(product(cells, spans, windows, setting.seeds))
    records: list[Record] = []
    for cell, span, window, seed in progress_iter(
        combinations, "truncation", len(combinations), "run"
    ):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = LastStep(SYMBOLS, RecurrentStack(cell, 2 * SYMBOLS, 64))
        model.stack.requires_grad_(window != "frozen")
        steps_back = int(window) if window.isdigit() else 0

        def loss_of(
            _: int,
            model: nn.Module = model,
            g: torch.Generator = generator,
            problem: tuple[int, int] = (span, steps_back),
        ) -> Tensor:
            x, first = recall_problem(64, problem[0], g)
            return cross_entropy(model(x, None, problem[1]), first)

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.003)
        fit(model, loss_of, setting.pick(500, 5), optimizer, done=lambda h: h.is_below(0.01))
        with torch.no_grad():
            x, first = recall_problem(512, span, torch.Generator().manual_seed(1000 + seed))
            right = float((model(x).argmax(1) == first).float().mean())
        shown = {"cell": cell, "span": span, "window": window, "seed": seed}
        records.append({**shown, "accuracy": right})
    return records


def draw_truncation(records: Sequence[Record]) -> Any:
    """Draw accuracy as a map of window against span, a frame for each cell."""
    cells = groups(records, ("cell",))
    figure = new_figure(len(cells), 1, 3.3, 3.4)
    for place, ((cell,), of_cell) in enumerate(cells.items()):
        axes = figure.add_subplot(1, len(cells), place + 1)
        draw_map(axes, of_cell, "span", "window", "accuracy", "accuracy")
        axes.set_title(cell, color=COLOURS[cell])
        axes.set(xlabel="steps between symbol and answer", ylabel="" if place else "window, steps")
    figure.suptitle("share of symbols recalled (guessing: 0.125)")
    return figure
