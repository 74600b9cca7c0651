"""The course at the head of the page: the text of ``course.md``, with numbers of the results."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from captioner.files import read_json
from captioner.models.recurrent_cells import gru_step, lstm_step, tanh_step
from experiments.recurrence.captioning import tuned
from experiments.recurrence.pictures import COLOURS, Record, groups, mean

TEXT = Path(__file__).with_name("course.md")


def course(results: Path) -> str:
    """Return the course as Markdown, with the lines of the cells and the numbers of studies in it.

    Args:
        results: Folder of the studies' JSON files.

    Raises:
        DataError: A study that it tells of hasn't been run.
    """
    text = TEXT.read_text(encoding="utf-8")
    values = {cell.__name__: _lines_of(cell) for cell in (tanh_step, lstm_step, gru_step)}
    values |= _numbers(records_of(results))
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def records_of(results: Path) -> Callable[..., list[Record]]:
    """Return what gives the records of a study that have such fields; each file is read once."""
    read = cache(lambda name: read_json(results / f"{name}.json")["records"])

    def of(study: str, **fields: Any) -> list[Record]:
        chosen = [r for r in read(study) if all(r[name] == v for name, v in fields.items())]
        assert chosen, f"{study} has no record with {fields}"
        return chosen

    return of


def _lines_of(function: Callable[..., Any]) -> str:
    """Return the lines of a step's equations: without its head, its docstring and its records."""
    source = textwrap.dedent(inspect.getsource(function))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.FunctionDef)
    statements = [node for node in tree.body[1:] if not isinstance(node, ast.If)]
    return "\n".join(ast.get_source_segment(source, node) or "" for node in statements)


def _numbers(of: Callable[..., list[Record]]) -> dict[str, str]:
    """Return what the text says of each study, by the name of its place."""

    def solved(remedy: str, length: int) -> str:
        return _share([r["solved"] for r in of("adding", remedy=remedy, length=length)])

    def back(cell: str, start: str) -> float:
        records = of("gradient_distance", cell=cell, start=start, of="state")
        return mean(records, "50_back")

    cost = of("cost", cell="gru", width=256)
    lstm = {bias: back("lstm", f"orthogonal, forget bias {bias}") for bias in (0, 1, 4)}
    tanh, irnn = back("rnn_tanh", "orthogonal"), back("rnn_relu", "identity")
    names = ("lstm", "gru", "rnn_tanh", "rnn_relu")
    cider = {}
    for features in ("plain", "normalised"):
        captions = groups(tuned(of("captioning"), features), ("cell",))
        cider[features] = [mean(captions[name,], "CIDEr-D") for name in names]
    perplexity = [mean(of("next_word", model=name), "perplexity") for name in names]
    lengths = (50, 200)
    watched = of("cells_at_work")
    return {
        "captions": _captions(watched),
        "probes": _probes([r for r in watched if r["cell"] == "lstm" and "probes" in r]),
        "gradient_rows": f"In `gradient_distance`, where inputs have size 1, {tanh:.1g} of the "
        f"gradient of a tanh network arrives 50 steps back, and {irnn:.2g} of that of an IRNN.",
        "irnn": "`adding`: solved with seeds, at 50 and 200 steps: "
        + " and ".join(solved("rnn_relu, identity (IRNN)", length) for length in lengths),
        "gru": "`adding`, GRU: " + " and ".join(solved("gru, orthogonal", n) for n in lengths),
        "lstm": "LSTM: " + " and ".join(solved("lstm, forget bias 1", n) for n in lengths),
        "gru_200": solved("gru, orthogonal", 200),
        "lstm_200": solved("lstm, forget bias 1", 200),
        "tanh_200": solved("rnn_tanh, orthogonal", 200),
        "parameters_of_gru": f"{mean(cost, 'parameters_of_lstm'):.2f}",
        "time_of_gru": f"{mean(cost, 'time_of_lstm'):.1f}",
        **{f"lstm_{bias}": f"{value:.1g}" for bias, value in lstm.items()},
        "tanh_50": f"{tanh:.1g}",
        **{f"cider_{name}": _list(names, values, 2) for name, values in cider.items()},
        "gains": _table(gains(of)),
        "perplexity": _list(names, perplexity, 1),
        **_verdicts(of),
        **_shared_weights(of),
    }


def gains(of: Callable[..., list[Record]]) -> list[list[str]]:
    """Return what each cell costs and brings, as rows of a table, its head first.

    Args:
        of: Returns the records of a study with such fields.
    """
    captions = groups(tuned(of("captioning"), "normalised"), ("cell",))
    costs = ("parameters_of_lstm", "time_of_lstm", "step_of_lstm")
    head = "cell, weights, time of training, time of a step of search, captions (CIDEr-D), "
    head += "next word (perplexity), words at their place in reverse, adding: runs solved"
    rows = [head.split(", "), ["---"] * 8]
    for cell in COLOURS:
        of_cost = of("cost", cell=cell, width=256)
        adding = groups((r for r in of("adding") if r["cell"] == cell), ("remedy",))
        solved = max(sum(r["solved"] for r in records) for records in adding.values())
        runs = len(next(iter(adding.values())))
        rows.append([cell, *(f"{mean(of_cost, name):.2f}" for name in costs)])
        rows[-1] += [
            f"{mean(captions[cell,], 'CIDEr-D'):.2f}",
            f"{mean(of('next_word', model=cell), 'perplexity'):.1f}",
            f"{mean(of('reversal', model=f'{cell}, then {cell}'), 'right_place'):.2f}",
            f"{solved:.0f} of {runs}",
        ]
    return rows


def _shared_weights(of: Callable[..., list[Record]]) -> dict[str, str]:
    """Return the numbers of the studies of length, of steps and features, and of depth."""

    def error(model: str, length: int) -> str:
        return f"{mean(of('any_length', model=model), f'error_{length}'):.2g}"

    def layout(name: str, field: str) -> str:
        value = mean(of("steps_or_features", cell="gru", read_as=name), field)
        return f"{value:,.0f}" if field == "parameters" else f"{value:.2g}"

    def deep(cell: str, layers: str) -> str:
        return f"{mean(of('depth', cell=cell, layers=layers), 'perplexity'):.1f}"

    windows = [f"feed-forward, window of {steps}" for steps in (50, 400)]
    sizes = [f"{mean(of('any_length', model=name), 'parameters'):,.0f}" for name in windows]
    return {
        "gru_trained": error("gru", 50),
        "gru_longer": error("gru", 400),
        "lstm_longer": error("lstm", 400),
        "window_trained": error(windows[1], 50),
        "window_longer": error(windows[1], 400),
        "window_sizes": " and ".join(sizes),
        "gru_size": f"{mean(of('any_length', model='gru'), 'parameters'):,.0f}",
        "as_steps": layout("40 steps of 1", "error"),
        "as_features": layout("1 step of 40", "error"),
        "as_steps_size": layout("40 steps of 1", "parameters"),
        "as_features_size": layout("1 step of 40", "parameters"),
        "as_steps_longer": layout("40 steps of 1", "error_of_60"),
        **{
            f"depth_{cell}": ", ".join(deep(cell, layers) for layers in "1234")
            + f"; one wide layer {deep(cell, '1, wide')}"
            for cell in ("lstm", "gru", "rnn_tanh")
        },
    }


def _verdicts(of: Callable[..., list[Record]]) -> dict[str, str]:
    """Return the numbers of the textbook's claims about clipping, starts, gates and directions.

    Args:
        of: Returns the records of a study with such fields.
    """

    def solved(study: str, **fields: Any) -> str:
        return _share([record["solved"] for record in of(study, **fields)])

    def adding(remedy: str, length: int) -> str:
        return solved("adding", remedy=remedy, length=length)

    def norm(cell: str) -> str:
        records = of("exploding", cell=cell, length=100, clipping="none")
        return f"{max(record['largest_norm'] for record in records):,.0f}"

    names = ("lstm", "gru", "rnn_tanh", "rnn_relu")
    whole = [mean(of("reversal", model=f"{n}, then {n}"), "whole_captions") for n in names]
    both, forward = (
        f"{mean(of('tagging', model=f'lstm, {way}'), 'accuracy'):.1%}"
        for way in ("both, same size", "forward")
    )
    return {
        "norm_lstm": norm("lstm"),
        "norm_irnn": norm("rnn_relu"),
        "tanh_100": adding("rnn_tanh, orthogonal", 100),
        "relu_100": adding("rnn_relu, orthogonal", 100),
        "irnn_100": adding("rnn_relu, identity (IRNN)", 100),
        **{
            f"lstm_{bias}_solved": " and ".join(
                adding(f"lstm, forget bias {bias}", length) for length in (100, 200)
            )
            for bias in (0, 1, 4)
        },
        "no_input": solved("gates", model="lstm, input gate 1"),
        "no_forget": solved("gates", model="lstm, forget gate 0"),
        "no_reset": solved("gates", model="gru, reset gate 1"),
        "both": both,
        "forward": forward,
        "reversal": _list(names, whole, 2),
    }


def _share(values: Sequence[float]) -> str:
    return f"{int(sum(values))} of {len(values)}"


def _list(names: Sequence[str], values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{n} {v:.{digits}f}" for n, v in zip(names, values, strict=True))


def _captions(records: Sequence[Record]) -> str:
    """Return the first photograph's caption by each cell after each epoch, as a table."""
    cells = groups(records, ("cell",))
    rows = [["epoch", *(cell for (cell,) in cells)], ["---"] * (len(cells) + 1)]
    for (epoch,), of_epoch in groups(records, ("epoch",)).items():
        if epoch:  # before training there are words alone
            rows.append([str(epoch), *(record["captions"][0] for record in of_epoch)])
    return _table(rows)


def _probes(records: Sequence[Record]) -> str:
    """Return what the probes of an untrained and a trained network found, as rows of a table."""
    rows = []
    for before, after in zip(*(record["probes"] for record in records), strict=True):
        scores = [of[name] for of in (after, before) for name in ("all_units", "one_unit")]
        scores += [after["last_word"], after["shuffled"]]
        rows.append([after["target"], *(f"{score:.2f}" for score in scores)])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
