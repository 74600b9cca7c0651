"""The course says what is so: its worked numbers are the cells', its other numbers the studies'."""

import re

import pytest
import torch

from captioner.models.recurrent import RecurrentStack
from captioner.models.recurrent_cells import gru_step, lstm_step
from experiments.recurrence.course import TEXT, course
from experiments.recurrence.study import HERE

COURSE = TEXT.read_text(encoding="utf-8")


def single_unit(recurrent_weight):
    stack = RecurrentStack("rnn_tanh", 1, 1, return_sequences=True)
    with torch.no_grad():
        for input_weight, input_bias, weight, bias in stack.layer_weights():
            input_weight.fill_(1.0)
            weight.fill_(recurrent_weight)
            input_bias.zero_()
            bias.zero_()
    return stack


def test_three_steps_by_hand():
    rows = re.findall(
        r"^\| (\d) \| (-?\d) \| .* = (-?[\d.]+) \| (-?[\d.]+) \|$", COURSE, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["1", "2", "3"]
    x = torch.tensor([[[float(row[1])] for row in rows]])
    stack = single_unit(0.5)
    unrolled = stack.unroll(x)
    h = stack(x)[0, :, 0]
    assert [float(row[3]) for row in rows] == pytest.approx(h.tolist(), abs=5e-5)
    assert [float(row[2]) for row in rows] == pytest.approx(torch.atanh(h).tolist(), abs=1e-4)
    first, last = unrolled.states[0][0][0], unrolled.states[0][2][0]
    (gradient,) = torch.autograd.grad(last.sum(), first)
    said = re.search(r"= \*\*([\d.]+)\*\*", COURSE)
    assert float(said[1]) == pytest.approx(gradient.item(), abs=5e-5)


def numbers_of(cell):
    line = re.search(rf"^\| {cell} \|.*\|$", COURSE, re.MULTILINE)[0]
    before, gates, after = line.split("|")[2:5]
    return [dict(re.findall(r"(\w) = ([\d.]+)", part)) for part in (before, gates, after)]


def test_a_step_of_the_lstm_by_hand():
    before, gates, after = numbers_of("LSTM")
    state = (torch.tensor([float(before["h"])]), torch.tensor([float(before["c"])]))
    from_input = torch.ones(4) + torch.tensor([0.0, 1.0, 0.0, 0.0])  # the forget gate's bias
    seen = {}
    h, c = lstm_step(from_input, state[0].repeat(4), state, seen)
    assert float(after["h"]) == pytest.approx(h.item(), abs=5e-5)
    assert float(after["c"]) == pytest.approx(c.item(), abs=5e-5)
    names = {"input": "i", "forget": "f", "candidate": "g", "output": "o"}
    for name, value in seen.items():
        assert float(gates[names[name]]) == pytest.approx(value.item(), abs=5e-5)


def test_a_step_of_the_gru_by_hand():
    before, gates, after = numbers_of("GRU")
    state = (torch.tensor([float(before["h"])]),)
    seen = {}
    (h,) = gru_step(torch.ones(3), state[0].repeat(3), state, seen)
    assert float(after["h"]) == pytest.approx(h.item(), abs=5e-5)
    for name, value in seen.items():
        letter = {"reset": "r", "update": "z", "candidate": "n"}[name]
        assert float(gates[letter]) == pytest.approx(value.item(), abs=5e-5)


def test_all_places_are_filled_with_lines_and_numbers():
    text = course(HERE / "results")
    assert not re.findall(r"\{[a-z]\w*\}", text)
    for line in ("c = f * state[1] + i * g", "n = torch.tanh(new + r * from_new)"):
        assert line in text
    assert "gates.update" not in text
    assert "nan" not in text
