"""Layers above each other."""

import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from captioner.metrics.report import new_figure
from captioner.models.recurrent import RecurrentStack
from captioner.progress import progress_iter
from experiments.recurrence.captions import pad_rows
from experiments.recurrence.memory import SOLVED, learn_to_add
from experiments.recurrence.pictures import Record, draw_lines
from experiments.recurrence.sequences import LanguageModel, language_captions, perplexity
from experiments.recurrence.study import Setting, batch_of, fit

CELLS = ("lstm", "gru", "rnn_tanh")
WIDTH = 96
BUDGET = 300  # batches of the adding problem


def depth(setting: Setting) -> list[Record]:
    """Depth: one to four layers.

    Each layer reads the states of the one below at each step. Two tasks: the next word
    (`next_word`, 96 units a layer, 250 batches of 64 captions, perplexity of held-out captions),
    and the adding problem over 50 steps (64 units a layer, a learning rate of 0.01, at most 300
    batches). The rows "1, wide" have one layer of twice the units, which is as many weights as four
    layers have in the language model: is it the depth, or the size? `parameters`, of the recurrence
    alone, and `seconds` of training, beside other studies, are the language model's.
    """
    captions, held_out, size = language_captions(setting, setting.pick(2000, 50))
    shapes = {"1": (1, WIDTH), "2": (2, WIDTH), "3": (3, WIDTH), "4": (4, WIDTH)}
    shapes["1, wide"] = (1, 2 * WIDTH)
    cells, names = setting.pick(CELLS, ("gru",)), setting.pick(tuple(shapes), ("1", "2"))
    combinations = list(product(cells, names, setting.seeds))
    records: list[Record] = []
    for cell, name, seed in progress_iter(combinations, "depth", len(combinations), "run"):
        layers, width = shapes[name]
        torch.manual_seed(seed)
        random = np.random.default_rng(seed)
        stack = partial(RecurrentStack, cell, layers=layers, return_sequences=True)
        model = LanguageModel(stack, size, width)

        def loss_of(
            _: int, model: LanguageModel = model, random: np.random.Generator = random
        ) -> torch.Tensor:
            rows = [captions[i] for i in batch_of(len(captions), random, 64)]
            return model.loss(pad_rows(rows)[0])

        started = time.perf_counter()
        fit(model, loss_of, setting.pick(250, 3), torch.optim.Adam(model.parameters(), lr=2e-3))
        record: Record = {"cell": cell, "layers": name, "seed": seed}
        record["seconds"] = time.perf_counter() - started
        with torch.no_grad():
            record["perplexity"] = perplexity(model, held_out)
        record["parameters"] = sum(p.numel() for p in model.hidden.parameters())
        make = partial(RecurrentStack, cell, 2, width * 64 // WIDTH, layers)
        history = learn_to_add(make, 50, 0.01, seed, setting.pick(BUDGET, 3))
        solved = history.is_below(SOLVED)
        record |= {"solved": float(solved), "batches": len(history.losses) if solved else None}
        records.append(record)
    return records


def draw_depth(records: Sequence[Record]) -> Any:
    """Draw perplexity over depth, and how soon the adding problem is solved."""
    figure = new_figure(2, 1, 4.6, 3.2)
    deep = [{**r, "layers": int(r["layers"])} for r in records if r["layers"].isdigit()]
    labels = {"perplexity": "perplexity of the next word", "batches": "batches until it can add"}
    for place, (name, label) in enumerate(labels.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        draw_lines(axes, deep, "layers", name, ("cell",), linear=True, marker=".")
        axes.set(ylabel=label)
    return figure
