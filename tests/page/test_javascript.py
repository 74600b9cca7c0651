"""The page's JavaScript that needs no browser, run by Node: the results are those of Python."""

import dataclasses
import json
import shutil
import subprocess

import numpy as np
import PIL
import pytest
from PIL import Image

from captioner.data.preprocessing import Preprocessing
from captioner.data.vocabulary import EOS, Vocabulary
from captioner.page.writer import STATIC
from captioner.runtime.beam_search import beam_search
from captioner.runtime.captioner import to_pixels
from captioner.search.consensus import Ngrams, rerank
from captioner.search.hypothesis import Hypothesis
from captioner.search.rules import Constraints
from captioner.search_config import SearchConfig

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "dog", "with", "cat", "red", "on", "ball", "the"]


READ_VALUE = """import { readFileSync } from "fs";
const value = JSON.parse(readFileSync("value.json"));
"""


@pytest.fixture(scope="module")
def run_node(tmp_path_factory):
    """Return a function that gives JSON to a script and returns the JSON that it prints."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js")
    folder = tmp_path_factory.mktemp("modules")
    shutil.copytree(STATIC, folder, dirs_exist_ok=True)
    (folder / "package.json").write_text('{"type": "module"}')

    def run(script: str, value: object) -> list:
        (folder / "value.json").write_text(json.dumps(value))
        (folder / "script.js").write_text(READ_VALUE + script)
        words = [node, "script.js"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


# --- preprocessing ----------------------------------------------------------------------------

TO_PIXELS = """
import { toPixels } from "./preprocessing.js";
const found = value.map(({ width, height, rgba, preprocessing }) => {
  const bytes = Uint8ClampedArray.from(rgba);
  const read = (top, rows) => bytes.subarray(4 * width * top, 4 * width * (top + rows));
  return [...toPixels({ width, height, read }, preprocessing)];
});
console.log(JSON.stringify(found));
"""
SIZES = [(64, 48), (48, 64), (31, 31), (300, 20), (1, 1), (97, 131), (20, 25)]
TALL_SIZES = [(9, 100), (23, 200), (3, 700), (90, 170)]
if int(PIL.__version__.split(".")[0]) >= 13:  # before, they were scaled in another order
    SIZES += TALL_SIZES
PREPROCESSINGS = [
    Preprocessing("squash", 48, 48, "bilinear"),
    Preprocessing("squash", 31, 31, "bicubic"),
    Preprocessing("crop", 32, 37, "bilinear"),
    Preprocessing("crop", 33, 48, "bicubic"),
]


def noise(width: int, height: int) -> np.ndarray:
    """Return an image of large and small differences, which shows each error of rounding."""
    random = np.random.default_rng(width * 1000 + height)
    image = random.integers(0, 256, (height, width, 3))
    return np.where(random.random((height, width, 1)) < 0.3, image // 255 * 255, image).astype("u1")


@pytest.mark.parametrize(
    "preprocessing", PREPROCESSINGS, ids=lambda p: f"{p.resize}-{p.interpolation}"
)
def test_pixels_are_those_of_pillow(run_node, preprocessing):
    cases, expected = [], []
    for size in SIZES:
        image = noise(*size)
        rgba = np.dstack([image, np.full(image.shape[:2], 255, "u1")])
        cases.append(
            {"width": size[0], "height": size[1], "rgba": rgba.ravel().tolist()}
            | {"preprocessing": preprocessing.to_dict()}
        )
        expected.append(to_pixels(preprocessing.square(Image.fromarray(image))).ravel())
    for size, found, wanted in zip(SIZES, run_node(TO_PIXELS, cases), expected, strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=f"{size}")


# --- search -----------------------------------------------------------------------------------

SEARCH = """
import { beamSearch } from "./beam_search.js";
import { score } from "./consensus.js";
const { table, cases } = value;
// The state is the sum of the tokens so far, and the table's place follows from it.
function step(tokens, [sums]) {
  const places = tokens.map((token, place) => (7 * sums[place] + token) % table.length);
  const logProbs = Float32Array.from(places.flatMap((place) => table[place]));
  return { logProbs, state: [Float32Array.from(tokens, (token, place) => sums[place] + token)] };
}
const found = [];
for (const { settings, constraints } of cases) {
  const start = [new Float32Array(1)];
  found.push(await beamSearch(step, start, settings, constraints).then(
    (hypotheses) => hypotheses.map((each) => [each.tokens, each.total, score(each, settings)]),
    (error) => error.message,
  ));
}
console.log(JSON.stringify(found));
"""
SETTINGS = [
    {},
    {"beam_size": 1},
    {"beam_size": 1, "no_repeat_word": True, "min_length": 6},
    {"beam_size": 4, "n_best": 4, "length_penalty": 0.0},
    {"beam_size": 8, "n_best": 3, "length_penalty": 1.3, "no_repeat_ngram": 2},
    {"beam_size": 3, "n_best": 3, "no_repeat_ngram": 1, "max_length": 30},
    {"n_best": 5, "no_dangling_end": True, "max_length": 4},
    {"n_best": 5, "no_dangling_end": True, "min_length": 5, "max_length": 7},
    {"forbidden": ("a dog", "cat", "the red ball", "zebra"), "n_best": 2},
    {"beam_size": 60, "n_best": 50, "max_length": 3},
    {"max_length": 1, "no_dangling_end": True, "n_best": 5},
]


def test_searches_find_what_python_finds(run_node):
    """With a model of random probabilities, and every kind of constraint."""
    vocabulary, random = Vocabulary(WORDS), np.random.default_rng(0)
    logits = random.normal(0, 2, (101, len(WORDS))).astype(np.float32)
    table = logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def step(tokens, state, memory):
        places = (7 * state[0] + tokens) % len(table)
        return table[places.astype(int)], (state[0] + tokens,)

    cases, expected = [], []
    for changes in SETTINGS:
        settings = SearchConfig(**{"max_length": 9} | changes)
        constraints = Constraints.from_config(settings, vocabulary)
        cases.append(
            {"settings": dataclasses.asdict(settings)}
            | {"constraints": dataclasses.asdict(constraints)}
        )
        expected.append(beam_search(step, (np.zeros((1, 1)),), (), settings, constraints)[0])
    found = run_node(SEARCH, {"table": table.tolist(), "cases": cases})
    assert len({len(hypotheses[0][0]) for hypotheses in found}) > 2  # captions of several lengths
    for changes, ours, theirs, case in zip(SETTINGS, found, expected, cases, strict=True):
        words = [[*each.token_ids, *[EOS] * each.ended] for each in theirs]
        assert [tokens for tokens, _, _ in ours] == words, changes
        penalty = case["settings"]["length_penalty"]
        for (_, total, score), each in zip(ours, theirs, strict=True):
            assert total == pytest.approx(each.log_probability, rel=1e-6)
            assert score == pytest.approx(each.score(penalty), rel=1e-6)


RERANK = """
import { Ngrams, rerank, score } from "./consensus.js";
const { content, settings, cases } = value;
const ngrams = new Ngrams(content);
const found = cases.map(({ hypotheses, expected }) =>
  rerank(hypotheses, expected, ngrams, settings).map((each) => [each.tokens, score(each, settings)])
);
console.log(JSON.stringify(found));
"""


def test_a_consensus_ranks_as_in_python(run_node):
    """Random captions and expectations, with n-grams that come twice and such as are unknown."""
    random = np.random.default_rng(0)
    ngrams = [random.integers(4, 9, order).tolist() for order in (1, 2, 3, 4) for _ in range(15)]
    ngrams = [list(each) for each in dict.fromkeys(map(tuple, ngrams))]
    content = {"token_ids": ngrams, "rarity": random.random(len(ngrams)).tolist(), "unseen": 2.5}
    settings = SearchConfig(beam_size=6, n_best=3, consensus=1.5, length_penalty=0.6)
    cases, expected = [], []
    for _ in range(20):
        rows = [
            Hypothesis(random.integers(4, 9, length).tolist(), -random.random() * 3, length != 5)
            for length in (0, 1, 3, 5, 9, 12)
        ]
        of_image = random.random(len(ngrams)).astype(np.float32)
        (best,) = rerank([rows], of_image[None], Ngrams.of_content(content), settings)
        score = [each.score(settings.length_penalty, settings.consensus) for each in best]
        expected.append([each.token_ids for each in best] + score)
        hypotheses = [
            {"tokens": [*each.token_ids, *[EOS] * each.ended], "ended": each.ended}
            | {"total": each.log_probability}
            for each in rows
        ]
        cases.append({"hypotheses": hypotheses, "expected": of_image.tolist()})
    value = {"content": content, "settings": dataclasses.asdict(settings), "cases": cases}
    for ours, theirs in zip(run_node(RERANK, value), expected, strict=True):
        assert [[token for token in tokens if token != EOS] for tokens, _ in ours] == theirs[:3]
        assert [score for _, score in ours] == pytest.approx(theirs[3:], rel=1e-6)


def test_nan_is_no_caption(run_node):
    table = [[-1.0] * 11 + ["NaN"]]
    case = {"settings": dataclasses.asdict(SearchConfig())}
    case["constraints"] = dataclasses.asdict(Constraints())
    (message,) = run_node(SEARCH, {"table": table, "cases": [case]})
    assert "the model gives NaN" in message
