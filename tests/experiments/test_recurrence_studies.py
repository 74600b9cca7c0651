"""The studies of recurrence: their problems are what they say, and each runs through."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from captioner.metrics.report import new_figure, save_figure
from captioner.models.recurrent import RecurrentStack
from experiments.recurrence import (
    gates,
    gradients,
    lengths,
    memory,
    sequences,
    tagging,
    unshuffle,
)
from experiments.recurrence.__main__ import STUDIES, main
from experiments.recurrence.captioning import tuned
from experiments.recurrence.pictures import COLOURS, GREY, colour_of, draw_dots
from experiments.recurrence.study import HERE, Setting, fit, table, write_page

ROOT = Path(__file__).parents[2]
FLICKR8K = ROOT.parent / "shared/data/flickr8k"
WEIGHTS = ROOT.parent / "shared/weights/mobilenet_v2_imagenet.pth"
GENERATED = [
    *("time_series", "gradient_distance", "spectral_radius", "exploding", "adding"),
    *("truncation", "cost", "any_length", "steps_or_features"),
]
OF_CAPTIONS = [
    *("one_to_one", "many_to_one", "unshuffle", "reversal", "tagging", "next_word"),
    *("depth", "gates", "captioning", "cells_at_work"),
]


# --- problems -----------------------------------------------------------------------------------


def test_adding_problem():
    x, y = memory.adding_problem(500, 20, torch.Generator().manual_seed(0))
    assert x.shape == (500, 20, 2)
    assert torch.equal(x[..., 1].sum(1), torch.full((500,), 2.0))
    assert torch.equal(x[:, :10, 1].sum(1), torch.ones(500))
    torch.testing.assert_close(y, (x[..., 0] * x[..., 1]).sum(1, keepdim=True))
    assert float((y - 1).square().mean()) == pytest.approx(1 / 6, abs=0.02)


def test_the_best_rate_solves_most_then_soonest_then_errs_least():
    def trial(*runs):
        return [{"solved": float(s), "steps": n, "error": e} for s, n, e in runs]

    best_first = [
        trial((1, 900, 0.02), (1, 900, 0.02)),
        trial((1, 10, 0.02), (0, 1000, 0.1)),
        trial((0, 1000, 0.1), (0, 1000, 0.2)),
        trial((0, 1000, 0.1), (0, 1000, 0.3)),
        trial((0, 1000, 0.01), (0, 3, None)),  # dying early is no speed
    ]
    worst_first = best_first[::-1]
    assert sorted(worst_first, key=memory.rank_of_trial) == best_first


def test_recall_problem():
    x, first = memory.recall_problem(300, 7, torch.Generator().manual_seed(0))
    assert x.shape == (300, 8, 16)
    symbols = x.argmax(2)
    assert torch.equal(symbols[:, 0], first)
    assert int(symbols[:, 1:].min()) == 8
    assert set(first.tolist()) == set(range(8))


def test_mackey_glass_follows_its_equation():
    """A finer method by hand, from the same past, stays near over some steps."""
    x = sequences.mackey_glass(200, 0)
    assert 0.2 < x.min() < 0.6
    assert 1.1 < x.max() < 1.5
    assert np.array_equal(x, sequences.mackey_glass(200, 0))
    slope = (x[2:] - x[:-2]) / 2
    late, now = x[1 : 1 + 180 - 17], x[18 : 18 + 180 - 17]
    expected = 0.2 * late / (1 + late**10) - 0.1 * now
    np.testing.assert_allclose(slope[17 : 17 + len(expected)], expected, atol=0.012)


def test_shuffled_rows_come_back_in_order():
    captions = [[4, 5, 6, 7], [8, 9], [5, 5, 4]]
    token_ids, lengths, order = unshuffle.shuffled_rows(captions, np.random.default_rng(0))
    assert lengths.tolist() == [4, 2, 3]
    back = token_ids.gather(1, order)
    assert [row[:n].tolist() for row, n in zip(back, lengths, strict=True)] == captions
    assert all(sorted(row.tolist()) == [0, 1, 2, 3] for row in order)


def test_a_bag_of_words_sees_no_order():
    torch.manual_seed(0)
    token_ids, lengths = torch.tensor([[4, 5, 6, 0]]), torch.tensor([3])
    other = torch.tensor([[6, 4, 5, 0]])
    for cell in ("", "lstm"):
        model = sequences._Reader(cell, 9)
        same = torch.allclose(model(token_ids, lengths), model(other, lengths), atol=1e-6)
        assert same == (cell == "")


@pytest.mark.parametrize(("encoder", "decoder"), [("bag", ""), ("bag", "lstm"), ("gru", "gru")])
def test_unshuffling_says_each_word_once_and_learns_what_it_is_trained_for(encoder, decoder):
    torch.manual_seed(0)
    model = unshuffle.Unshuffler(encoder, decoder, 12, width=24)
    captions = [[4, 5, 6, 7], [8, 9], [5, 10, 11, 5, 4]]
    rows = unshuffle.shuffled_rows(captions, np.random.default_rng(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    history = fit(model, lambda _: model.loss(*rows), 60, optimizer)
    assert history.losses[-1] < 0.1 < history.losses[0]
    said = model.order(*rows[:2])
    assert [sorted(row.tolist()) for row in said] == [sorted(row.tolist()) for row in rows[0]]
    assert [row[: len(c)].tolist() for row, c in zip(said, captions, strict=True)] == captions


def test_reversed_rows_are_as_they_were_read_but_backwards():
    captions = [[4, 5, 6, 7], [8, 9], [5, 5, 4]]
    token_ids, lengths, order = unshuffle.reversed_rows(captions, np.random.default_rng(0))
    answers = token_ids.gather(1, order)
    for row, n in enumerate(lengths.tolist()):
        assert answers[row, :n].tolist() == token_ids[row, :n].tolist()[::-1]
        assert sorted(answers[row, :n].tolist()) == sorted(captions[row])
        assert not answers[row, n:].any()


def test_the_chance_of_an_order_by_hand():
    """Of a, a, b: 2 of 6 orders; the words a are right in 4/3 places of two, b in 1/3 of one."""
    found = unshuffle.chance_of_order([[4, 4, 5], [4, 5]])
    assert found["right_place"] == pytest.approx((5 / 3 + 1) / 5)
    assert found["whole_captions"] == pytest.approx((2 / 6 + 1 / 2) / 2)


@pytest.mark.parametrize("name", gates.VARIANTS)
def test_variants_follow_their_equations(name):
    """Against steps by hand; the gate that is fixed keeps its number after training."""
    torch.manual_seed(0)
    stack = gates.make_variant(name, 3, 4, sequences=True)
    x = torch.randn(2, 5, 3)
    optimizer = torch.optim.Adam(stack.parameters(), lr=0.1)
    fit(stack, lambda _: (stack(x) - 0.3).square().mean(), 3, optimizer)
    cell, change = gates.VARIANTS[name]
    input_weight, input_bias, weight, bias = stack.layer_weights()[0]
    h = c = torch.zeros(2, 4)
    for t in range(5):
        from_input, from_hidden = x[:, t] @ input_weight.T + input_bias, h @ weight.T + bias
        parts = [(p.chunk(4 if cell == "lstm" else 3, 1)) for p in (from_input, from_hidden)]
        openings = [torch.sigmoid(a + b) for a, b in zip(*parts, strict=True)]
        if isinstance(change, tuple):
            fixed = {gates.OPEN: 1.0, gates.HALF: 0.5, gates.CLOSED: 0.0}[change[1]]
            openings[change[0]] = torch.full((2, 4), fixed)
        if change == "coupled":
            openings[1] = 1 - openings[0]
        if cell == "lstm":
            c = openings[1] * c + openings[0] * torch.tanh(parts[0][2] + parts[1][2])
            h = openings[3] * (c if change == "linear output" else torch.tanh(c))
        else:
            n = torch.tanh(parts[0][2] + openings[0] * parts[1][2])
            h = (1 - openings[1]) * n + openings[1] * h
        torch.testing.assert_close(stack(x)[:, t], h, rtol=0, atol=1e-5)


def test_weights_that_are_not_trained_are_not_counted():
    sizes = {
        name: gates.trained_weights(gates.make_variant(name, 2, 64)) for name in gates.VARIANTS
    }
    assert sizes["lstm"] == sizes["lstm, no tanh after c"] == 4 * 64 * (2 + 64 + 2)
    assert sizes["lstm, output gate 1"] == sizes["lstm, forget = 1 - input"] == sizes["gru"]
    assert sizes["gru, reset gate 1"] == 2 * 64 * (2 + 64 + 2)


def test_tags_by_hand():
    """A (0) dog (2) chases (0) a (0) man (1) here (0)."""
    tags = tagging.tag_of_words([0, 2, 0, 0, 1, 0])
    assert [divmod(tag, 4) for tag in tags] == [(0, 2), (0, 1), (2, 1), (2, 1), (2, 0), (1, 0)]


def test_the_bound_of_forward_readers_by_hand():
    """Of three words after "4" two have tag 1; the word "4" itself has tag 2 twice, 3 once."""
    captions = [[4, 5], [4, 5], [4, 5], [6]]
    tags = torch.tensor([[2, 1], [2, 1], [3, 0], [0, -100]])
    assert tagging.best_of_beginnings(captions, tags) == pytest.approx(5 / 7)


@pytest.mark.parametrize(
    ("reads", "sees_before", "sees_after"),
    [("", False, False), ("forward", True, False), ("backward", False, True), ("both", True, True)],
)
def test_a_tagger_sees_what_it_reads_alone(reads, sees_before, sees_after):
    torch.manual_seed(0)
    model = tagging.Tagger("gru" if reads else "", reads, 12)
    shown = [[4, 5, 6, 0], [7, 5, 6, 0], [4, 5, 8, 0]]
    answers = model(torch.tensor(shown), torch.tensor([3, 3, 3]))[:, 1]
    assert torch.allclose(answers[0], answers[1], atol=1e-6) != sees_before
    assert torch.allclose(answers[0], answers[2], atol=1e-6) != sees_after


def test_a_window_sees_its_last_steps_alone():
    torch.manual_seed(0)
    model = lengths._Window(3)
    x = torch.randn(2, 5, 2)
    other = x.clone()
    other[:, :2] += 1
    torch.testing.assert_close(model(x), model(other))
    other[:, 2] += 1
    assert not torch.allclose(model(x), model(other))
    short = nn.functional.pad(x[:, :2], (0, 0, 1, 0))  # zeros before the beginning
    torch.testing.assert_close(model(x[:, :2]), model(short))


def test_values_are_read_as_steps_of_so_many():
    model = lengths._Forecaster("gru", 5)
    x = torch.randn(2, 40)
    expected = model.read(torch.stack([x[:, i : i + 5] for i in range(0, 40, 5)], 1))
    torch.testing.assert_close(model(x), expected)


def test_the_best_settings_of_a_cell_are_those_with_normalised_features_too():
    def run(cell, scale, rate, features="plain", seed=0):
        shown = {"cell": cell, "embedding_scale": scale, "rate": rate}
        return {**shown, "features": features, "seed": seed}

    grid = [run(cell, scale, 0.1) for cell in ("lstm", "gru") for scale in (1, 2)]
    more = [run("lstm", 2, 0.1, "plain", 1), run("lstm", 2, 0.1, "normalised", 0)]
    more += [run("gru", 1, 0.1, "normalised", 0)]
    plain = tuned(grid + more, "plain")
    assert plain == [grid[1], more[0], grid[2]]
    assert tuned(grid + more, "normalised") == more[1:]


def test_counted_models_by_hand():
    found = sequences.count_perplexities([[1, 4, 2], [1, 4, 2]], [[1, 4, 2]], 6)
    unigram = 3 / 10  # 2 of 4 tokens, one added to each of 6 words
    assert found["unigram"] == pytest.approx(1 / unigram)
    assert found["bigram"] == pytest.approx(1 / (0.8 + 0.2 * unigram))


def test_a_linear_network_shrinks_gradients_by_its_radius():
    """Against theory: orthogonal weights times a radius, tanh near 0."""
    records = gradients.spectral_radius(Setting(Path("unused"), quick=True))
    for record in records:
        assert record["50_back"] == pytest.approx(record["share"][-1], rel=1e-3)
        if record["regime"] == "tanh, input 1e-12":
            assert record["slope"] == pytest.approx(record["radius"], rel=1e-4)
        else:  # the derivative of tanh is below 1
            assert record["slope"] < record["radius"]


def test_a_frozen_network_is_left_as_it_began(monkeypatch):
    """And its output is trained."""
    seen = []

    def kept(model, *arguments, **options):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        history = fit(model, *arguments, **options)
        seen.append([bool((a != b).any()) for a, b in zip(before, model.parameters(), strict=True)])
        return history

    monkeypatch.setattr(memory, "fit", kept)
    records = memory.truncation(Setting(Path("unused"), quick=True))
    changed = {record["window"]: row for record, row in zip(records, seen, strict=True)}
    assert changed["frozen"] == [False] * 4 + [True] * 2
    assert all(changed["1"])


def test_clipping_by_value_outlives_an_infinite_gradient():
    """Clipping by norm does not: infinity by infinity is no number."""
    for clip, clip_value, lives in ((1.0, 0.0, False), (0.0, 0.1, True)):
        model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss_of(step: int, model: nn.Module = model) -> torch.Tensor:
            answer = model(torch.ones(1, 1)).sum()
            return answer if step else (answer - answer.detach()) * 1e30 * 1e30

        history = fit(model, loss_of, 3, optimizer, clip, clip_value)
        assert history.losses[0] == 0
        assert history.norms[0] == math.inf
        assert math.isfinite(history.losses[-1]) == lives


# --- training and tables ------------------------------------------------------------------------


def test_fit_stops_at_a_loss_that_is_none_and_clips():
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def loss_of(step: int) -> torch.Tensor:
        return 100 * model(torch.ones(1, 1)).sum() * (math.nan if step == 1 else 1)

    history = fit(model, loss_of, 5, optimizer, clip=0.5)
    assert len(history.losses) == 2
    assert history.diverged
    assert history.norms[0] == pytest.approx(math.hypot(100, 100))
    moved = [a - b for a, b in zip(before, model.parameters(), strict=True)]
    assert math.hypot(*(each.item() for each in moved)) == pytest.approx(0.5)


def test_table_is_mean_and_deviation_over_seeds():
    records = [
        {"model": "a", "seed": 0, "score": 1.0, "weights": 1200},
        {"model": "a", "seed": 1, "score": 3.0, "weights": 1200},
        {"model": "b", "seed": 0, "score": None, "weights": None},
    ]
    lines = table(records, ("model",), ("score", "weights")).splitlines()
    assert lines[0] == "| model | score | weights | runs |"
    assert lines[2] == "| a | 2 ± 1.41 | 1,200 | 2 |"
    assert lines[3] == "| b | - | - | 1 |"


def test_kept_for_backward_counts_every_tensor_once():
    from experiments.recurrence.cost import _kept_for_backward

    x = torch.randn(4, 10, 8, requires_grad=True)
    sizes = [_kept_for_backward(RecurrentStack("rnn_tanh", 8, 8), x[:, :t]) for t in (5, 10)]
    assert sizes[1] > sizes[0] >= 4 * 5 * 8 * 4


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((HERE / "results").glob("*.json")), ids=lambda p: p.stem)
def test_a_picture_is_small_and_the_same_each_time(path, tmp_path):
    records = json.loads(path.read_text())["records"]
    for name in ("first.svg", "second.svg"):
        save_figure(tmp_path / name, STUDIES[path.stem].draw(records))
    first = (tmp_path / "first.svg").read_bytes()
    assert len(first) < 200_000
    assert first == (tmp_path / "second.svg").read_bytes()
    assert b"<text" in first
    assert path.with_suffix(".svg").stat().st_size < 200_000


def test_each_row_has_its_cell_s_colour_and_a_far_baseline_its_number():
    names = {"the mean": GREY, "bag, then lstm": COLOURS["lstm"], "gru": COLOURS["gru"]}
    names |= {"rnn_relu, one step": COLOURS["rnn_relu"]}
    values = {"the mean": 0.5, "bag, then lstm": 0.96, "gru": 0.97, "rnn_relu, one step": 0.965}
    records = [{"model": name, "score": values[name]} for name in names]
    axes = new_figure(1, 1).add_subplot()
    draw_dots(axes, records, "model", "score")
    assert [tick.get_color() for tick in axes.get_yticklabels()] == list(names.values())
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(names)
    places = {int(line.get_ydata()[0]): line.get_color() for line in axes.get_lines()}
    assert places == {row: colour_of(name) for row, name in enumerate(names) if row}
    written = [text.get_text() for text in axes.texts]
    assert "0.5" in written
    assert any("beyond the axis" in text for text in written)
    assert axes.get_xlim()[0] > 0.9
    assert "cut" in axes.get_xlabel()


def test_an_axis_begins_at_0_where_differences_are_large():
    records = [
        {"model": cell, "score": value} for cell, value in zip(COLOURS, (1, 4, 9, 2), strict=True)
    ]
    axes = new_figure(1, 1).add_subplot()
    draw_dots(axes, records, "model", "score")
    assert axes.get_xlim()[0] == 0
    assert "cut" not in axes.get_xlabel()


# --- whole studies ------------------------------------------------------------------------------


def check(output: Path, names: list[str]) -> None:
    page = (output / "README.md").read_text()
    for name in names:
        content = json.loads((output / "results" / f"{name}.json").read_text())
        assert content["quick"]
        assert content["records"]
        assert table(content["records"], STUDIES[name].keys, STUDIES[name].values) in page
        picture = (output / "results" / f"{name}.svg").read_text()
        assert ElementTree.fromstring(picture).tag.endswith("svg")
        assert f"(results/{name}.svg)" in page


@pytest.mark.parametrize("name", GENERATED)
def test_studies_of_generated_sequences_run_through(name, tmp_path):
    argv = [name, "--quick", "--output", str(tmp_path), "--wandb", "disabled"]
    assert main(argv) == 0
    check(tmp_path, [name])


def test_studies_of_captions_run_through(tmp_path, monkeypatch):
    """Each study on 96 photographs; the second time, captioning's runs are there already."""
    if not FLICKR8K.exists():
        pytest.skip("needs ../shared/data/flickr8k")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = ["--quick", "--output", str(tmp_path), "--wandb", "disabled"]
    argv += ["--data", str(FLICKR8K), "--weights", str(WEIGHTS)]
    for name in [*OF_CAPTIONS, "captioning"]:
        assert main([name, *argv]) == 0
    check(tmp_path, OF_CAPTIONS)
    records = json.loads((tmp_path / "results/many_to_one.json").read_text())["records"]
    assert next(r for r in records if r["model"] == "bag of words")["accuracy"] == 0.5


def test_a_page_that_is_written_again_keeps_what_was_seen(tmp_path, monkeypatch):
    from experiments.recurrence import study

    monkeypatch.setattr(study, "FINDINGS", tmp_path / "findings")
    setting = Setting(tmp_path, quick=True, wandb="disabled")
    assert main(["cost", "--quick", "--output", str(tmp_path), "--wandb", "disabled"]) == 0
    (tmp_path / "findings").mkdir()
    (tmp_path / "findings/cost.md").write_text("The GRU is no cheaper.\n")
    for _ in range(2):
        write_page(STUDIES, replace(setting))
        assert "**Seen.** The GRU is no cheaper." in (tmp_path / "README.md").read_text()


def test_every_study_is_here_and_says_what_it_asks():
    assert sorted(STUDIES) == sorted([*GENERATED, *OF_CAPTIONS])
    for study in STUDIES.values():
        title, _, asked = (study.measure.__doc__ or "").partition("\n")
        assert title
        assert len(asked.split()) > 20


def test_missing_data_is_one_line(tmp_path, capsys):
    argv = ["next_word", "--quick", "--output", str(tmp_path), "--wandb", "disabled"]
    assert main([*argv, "--data", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match("error: .*nowhere", error)
