"""Search settings: contradictions are refused, and every setting is explained."""

from dataclasses import fields

import pytest

from captioner.config import SearchConfig
from captioner.errors import ConfigError
from captioner.experiment_file import attribute_docs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"samples": 2, "beam_size": 4, "groups": 2},
            "samples and search.groups can't be combined",
        ),
        ({"samples": 2, "forced": ("a",)}, "samples and search.forced can't be combined"),
        ({"beam_size": 4, "groups": 2, "forced": ("a",)}, "groups and search.forced can't be"),
        ({"n_best": 6}, "n_best: at most search.beam_size = 5 was expected, found 6"),
        ({"n_best": 3, "samples": 2}, "n_best: at most search.samples = 2 was expected, found 3"),
        ({"groups": 2}, "groups: a divisor of search.beam_size = 5 was expected, found 2"),
        ({"groups": 10}, "groups: a divisor of search.beam_size = 5"),
        ({"groups": 0}, "groups: at least 1"),
        ({"temperature": 0.5}, "temperature has no effect without search.samples"),
        ({"top_k": 5}, "top_k has no effect without search.samples"),
        ({"top_p": 0.5}, "top_p has no effect without search.samples"),
        ({"diversity": 0.7}, "diversity has no effect without search.groups"),
        ({"min_length": 21}, "min_length: at most search.max_length = 20 was expected, found 21"),
        ({"samples": 1, "top_p": 1.5}, "top_p: at most 1 was expected, found 1.5"),
        ({"samples": 1, "top_p": 0.0}, "top_p: a number above 0"),
        ({"samples": 1, "temperature": 0.0}, "temperature: at least 1e-06"),
        ({"samples": -1}, "samples: at least 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram: at least 0"),
    ],
)
def test_settings_that_contradict_are_refused(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        SearchConfig(**settings)


def test_every_setting_is_explained():
    explained = attribute_docs(SearchConfig)
    assert list(explained) == [field.name for field in fields(SearchConfig)]
    assert all(len(text) > 10 and text.endswith(".") for text in explained.values())
    assert explained["beam_size"] == "Hypotheses kept; 1 is greedy search."
    assert explained["groups"].startswith("Diverse beam search: the beam is divided")
    assert explained["groups"].endswith("took at the same step.")


def test_one_text_where_a_list_is_meant_is_refused():
    for name in ("forced", "forbidden"):
        with pytest.raises(ConfigError, match=f"search.{name}: a list of words and phrases"):
            SearchConfig(**{name: "dog"})
