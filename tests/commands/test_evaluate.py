import csv
import json
import re

import pytest
import wandb_files
from PIL import Image

from captioner.commands.evaluate import main
from captioner.data.predictions import write_predictions
from captioner.errors import UsageError
from captioner.metrics.evaluation import read_evaluation, signature
from captioner.metrics.report import write_plot
from captioner.metrics.scores import compute_metrics

REFERENCES = {
    1: ["A red dog runs on the grass.", "The dog is running."],
    2: ["Two men play <b>chess</b> & talk.", "Men at a chess board."],
    3: ["A plane flies over the sea.", "An airplane in the sky."],
}
GOOD = {
    1: "a red dog runs on the grass",
    2: "two men play chess",
    3: "a plane flies over the sea",
}
BAD = {1: "a cat", 2: "two men with a", 3: "a dog a dog"}


def coco(path, references=REFERENCES, file_names=True):
    images = [
        {"id": key, **({"file_name": f"{key}.jpg"} if file_names else {})} for key in references
    ]
    annotations = [
        {"id": number, "image_id": key, "caption": text}
        for number, (key, text) in enumerate((k, t) for k, ts in references.items() for t in ts)
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def results(path, captions=GOOD):
    write_predictions(path, [{"image_id": key, "caption": text} for key, text in captions.items()])
    return path


def n_best(path, captions):
    lines = (json.dumps({"image_id": key, "captions": texts}) for key, texts in captions.items())
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def references(tmp_path):
    return coco(tmp_path / "references.json")


@pytest.fixture
def good(tmp_path):
    return results(tmp_path / "good.json")


@pytest.fixture
def bad(tmp_path):
    return results(tmp_path / "bad.json", BAD)


# --- scores --------------------------------------------------------------------------------------


def test_bleu_by_default_printed_and_written(tmp_path, references, good, capsys):
    output = tmp_path / "scores.json"
    assert run("--references", references, "--hypotheses", good, "--output", output) == 0
    written = json.loads(output.read_text())
    expected = compute_metrics(GOOD, REFERENCES)
    assert {name: written[name] for name in expected} == expected
    assert all(0 < written[f"BLEU-{order}"] <= 1 for order in range(1, 5))
    assert (written["images"], written["references"]) == (3, 6)
    printed = capsys.readouterr().out
    assert f"BLEU-4  {expected['BLEU-4']:.4f}" in printed
    assert written["signature"] in printed


def test_metrics_by_name_and_intervals(tmp_path, references, good, capsys):
    run("--references", references, "--hypotheses", good, "--metrics", "rouge-l, CIDEr-D",
        "--confidence", "--output", tmp_path / "s.json")  # fmt: skip
    assert re.search(r"CIDEr-D \d\.\d{4}  \[\d\.\d{4}, \d\.\d{4}\]", capsys.readouterr().out)
    written = json.loads((tmp_path / "s.json").read_text())
    low, high = written["confidence_95"]["good.json"]["ROUGE-L"]
    assert low <= written["ROUGE-L"] <= high


def test_two_files_are_compared(tmp_path, references, good, bad, capsys):
    output = tmp_path / "s.json"
    run("--references", references, "--hypotheses", bad, good, "--output", output)
    written = json.loads(output.read_text())
    assert written["scores"]["good.json"]["BLEU-1"] > written["scores"]["bad.json"]["BLEU-1"]
    row = written["comparisons"][0]
    difference = written["scores"]["good.json"]["BLEU-1"] - written["scores"]["bad.json"]["BLEU-1"]
    assert (row["first"], row["second"], row["metric"]) == ("bad.json", "good.json", "BLEU-1")
    assert row["difference"] == difference
    assert 0 < row["p"] <= 1
    assert "good.json - bad.json  BLEU-4" in capsys.readouterr().out


def test_statistics(tmp_path, references, bad, capsys):
    n_best(tmp_path / "n.jsonl", {key: ["a cat", "a dog"] for key in (3, 2, 1)})
    run("--references", references, "--hypotheses", bad, "--statistics", "--training-captions",
        references, "--n-best", tmp_path / "n.jsonl", "--output", tmp_path / "s.json")  # fmt: skip
    statistics = json.loads((tmp_path / "s.json").read_text())["statistics"]
    assert statistics["bad.json"]["ends_in_function_word"] == pytest.approx(1 / 3)
    assert statistics["bad.json"]["repeats_ngram"] == pytest.approx(1 / 3)
    assert statistics["bad.json"]["novel"] == 1
    assert statistics["references"]["novel"] == 0
    assert "self_bleu-4" in statistics["n-best"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"image_id": 1}'], "n.jsonl: line 1: an object with 'image_id' and 'captions', a list"),
        (['{"image_id": 1, "captions": "a dog"}'], "line 1: an object with"),
        (['{"image_id": 1, "captions": ["a", 3]}'], "line 1: an object with"),
        (["", '{"captions": ["a"]}'], "line 2: an object with"),
        (["[]"], "line 1: an object with"),
        (["{"], "line 1: not valid JSON"),
        (['{"image_id": 1, "captions": ["a"]}'] * 2, "line 2: image 1 comes twice"),
        (['{"image_id": 8, "captions": ["a"]}'], "there is no image in common"),
        (['{"image_id": "1", "captions": ["a"]}'], "differ only in type"),
    ],
)
def test_an_n_best_file_that_is_none_is_refused(tmp_path, references, bad, capsys, lines, message):
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    assert run("--references", references, "--hypotheses", bad, "--statistics",
               "--n-best", tmp_path / "n.jsonl") == 1  # fmt: skip
    assert message in capsys.readouterr().err


def test_an_n_best_file_must_have_the_images_that_are_scored(tmp_path, references, bad, capsys):
    n_best(tmp_path / "n.jsonl", {1: ["a b c d", "a b c d"], 2: ["e f g h"] * 2, 8: ["a"]})
    common = ("--references", references, "--hypotheses", bad, "--statistics",
              "--n-best", tmp_path / "n.jsonl", "--output", tmp_path / "s.json")  # fmt: skip
    assert run(*common) == 1
    refusal = capsys.readouterr().err
    assert "n.jsonl: 1 of 3 images of the references have no caption (ids 3)" in refusal
    assert "1 captions are of images that the references don't have (ids 8)" in refusal
    assert "--allow-missing" in refusal
    assert run(*common, "--allow-missing") == 0
    assert "(ids 8)" in capsys.readouterr().err
    statistics = json.loads((tmp_path / "s.json").read_text())["statistics"]
    assert statistics["n-best"]["self_bleu-4"] == pytest.approx(1, abs=1e-6)


def test_frequencies_are_saved_and_used(tmp_path, references, good):
    common = ("--references", references, "--hypotheses", good, "--metrics", "CIDEr-D")
    run(*common, "--save-frequencies", tmp_path / "df.json", "--output", tmp_path / "a.json")
    run(*common, "--frequencies", tmp_path / "df.json", "--output", tmp_path / "b.json")
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["CIDEr-D"] == b["CIDEr-D"] > 0
    assert a["signature"] != b["signature"]
    assert "df-references" in a["signature"]
    assert re.search(r"CIDEr-D:sigma-6,df-sha256-[0-9a-f]{12}\|", b["signature"])


def test_the_signature_names_what_frequencies_hold_and_not_their_file(tmp_path, references, good):
    common = ("--references", references, "--hypotheses", good, "--metrics", "CIDEr-D")

    def evaluate(counts, name="df.json"):
        (tmp_path / name).write_text(json.dumps({"images": 9, "counts": counts}))
        run(*common, "--frequencies", tmp_path / name, "--output", tmp_path / "s.json")
        written = json.loads((tmp_path / "s.json").read_text())
        return written["CIDEr-D"], written["signature"]

    first = evaluate({"dog": 2, "the": 5})
    other = evaluate({"dog": 9, "the": 5})
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert evaluate({"the": 5, "dog": 2}, "copy.json") == first


def test_cider_is_told_from_what_the_official_tool_calls_so(references, good, capsys):
    common = ("--references", references, "--hypotheses", good, "--metrics")
    assert run(*common, "CIDEr") == 0
    message = capsys.readouterr().err
    assert "prints as 'CIDEr' is CIDEr-D" in message
    assert message.count("\n") == 1
    assert run(*common, "CIDEr-D") == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "."], "--images has no effect without --report"),
        (["--link-images"], "--link-images has no effect without --images"),
        (["--link-images", "--report", "p.html"], "--link-images has no effect without --images"),
        (["--training-captions", "r.json"], "--training-captions has no effect without --stat"),
        (["--n-best", "n.jsonl"], "--n-best has no effect without --statistics"),
        (["--wandb-run", "x"], "--wandb-run has no effect without --wandb"),
        (["--frequencies", "df.json"], "--frequencies has no effect without CIDEr-D or CIDEr"),
        (["--plot", "p.gif"], "p.gif: a plot's name must end in .png, .svg or .pdf"),
        (["--metrics", ", ,"], "no metric is named"),
    ],
)
def test_options_without_effect_are_refused_at_once(options, message, capsys):
    assert run("--references", "no.json", "--hypotheses", "no.json", *options) == 2
    assert message in capsys.readouterr().err


def test_a_missing_images_folder_is_refused_at_once(tmp_path, capsys):
    images = tmp_path / "none"
    assert run("--references", "no.json", "--hypotheses", "no.json", "--report",
               tmp_path / "p.html", "--images", images) == 1  # fmt: skip
    assert f"--images: {images}: no such folder" in capsys.readouterr().err


def test_a_missing_java_is_one_line_and_the_rest_comes(
    tmp_path, references, good, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", "")
    common = ("--references", references, "--hypotheses", good)
    assert run(*common, "--metrics", "BLEU-1,METEOR,SPICE") == 0
    captured = capsys.readouterr()
    assert captured.err.count("left out: ") == 2
    assert "BLEU-1" in captured.out
    assert "METEOR" not in captured.out
    files = ("--report", tmp_path / "p.html", "--plot", tmp_path / "p.png")
    assert run(*common, "--metrics", "METEOR", *files) == 1
    assert "error: no score could be computed" in capsys.readouterr().err


def test_unknown_metric(references, good, capsys):
    assert run("--references", references, "--hypotheses", good, "--metrics", "BLUE") == 2
    assert "did you mean 'BLEU'" in capsys.readouterr().err


def test_signature_tells_references_apart(references, good, tmp_path):
    first = read_evaluation(references, [good])
    changed = {**REFERENCES, 3: ["A plane."]}
    second = read_evaluation(coco(tmp_path / "other.json", changed), [good])
    assert signature(first, ["BLEU-1"]) == signature(
        read_evaluation(references, [good]), ["BLEU-1"]
    )
    assert signature(first, ["BLEU-1"]) != signature(second, ["BLEU-1"])
    assert "images:3|references:6" in signature(first, ["BLEU-1"])


# --- input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_result_formats_with_integer_ids(tmp_path, references, suffix):
    read = read_evaluation(references, [results(tmp_path / f"r{suffix}")])
    assert read.hypotheses == {f"r{suffix}": GOOD}


def test_images_may_have_nothing_but_an_id(tmp_path, good):
    read = read_evaluation(coco(tmp_path / "bare.json", file_names=False), [good])
    assert read.references == REFERENCES
    assert read.file_names == {}


def test_karpathy_references_with_a_split(tmp_path, good):
    images = [
        {"cocoid": key, "filename": f"{key}.jpg", "split": "test" if key < 4 else "train",
         "sentences": [{"raw": text} for text in texts]}
        for key, texts in {**REFERENCES, 4: ["A bird."]}.items()
    ]  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    assert read_evaluation(tmp_path / "k.json", [good], split="test").references == REFERENCES


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_csv_references(tmp_path, suffix):
    lines = [f'{key},"{text}"' for key, texts in REFERENCES.items() for text in texts]
    (tmp_path / "r.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")
    read = read_evaluation(tmp_path / "r.csv", [results(tmp_path / f"h{suffix}")])
    assert list(read.hypotheses[f"h{suffix}"]) == ["1", "2", "3"]


def test_an_id_as_number_and_as_text_is_a_double(tmp_path):
    (tmp_path / "r.csv").write_text("image,caption\n1,a\n")
    (tmp_path / "h.json").write_text(
        '[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]'
    )
    assert run("--references", tmp_path / "r.csv", "--hypotheses", tmp_path / "h.json") == 1


def test_differences_are_refused_with_counts_and_ids(tmp_path, references, capsys):
    given = results(tmp_path / "h.json", {1: "a", 2: "b", 77: "c", 78: "d"})
    assert run("--references", references, "--hypotheses", given) == 1
    message = capsys.readouterr().err
    assert "1 of 3 images of the references have no caption (ids 3)" in message
    assert "2 captions are of images that the references don't have (ids 77, 78)" in message
    assert "--allow-missing" in message


def test_allow_missing_scores_the_intersection_and_says_so(tmp_path, references, good, capsys):
    given = results(tmp_path / "h.json", {1: GOOD[1], 2: "", 77: "c"})
    arguments = ("--references", references, "--hypotheses", given, good, "--allow-missing")
    assert run(*arguments, "--output", tmp_path / "s.json") == 0
    assert json.loads((tmp_path / "s.json").read_text())["images"] == 2
    message = capsys.readouterr().err
    assert "only the 2 images" in message
    assert "(ids 3); 1 captions are" in message
    assert "1 empty captions" in message


def test_images_without_references_are_named(tmp_path, capsys):
    references = coco(tmp_path / "r.json", {**REFERENCES, 4: []})
    given = results(tmp_path / "h.json", {**GOOD, 4: "a bird"})
    assert run("--references", references, "--hypotheses", given) == 1
    assert "1 images have no reference (ids 4)" in capsys.readouterr().err


@pytest.mark.parametrize("allow", [(), ("--allow-missing",)])
@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({9: "a"}, "ids 9); there is no image in common"),
        ({str(key): "a" for key in REFERENCES}, "did you mean 1, as in the references, by '1'? 3 "
         "such pairs differ only in type (a number on one side, text on the other); there is no"),
        ({f"{key}.jpg": "a" for key in REFERENCES}, "3 of them are file names of the references, "
         "whose ids are others ('1.jpg' has id 1): caption with --annotations"),
        ({f"{key}.png": "a" for key in REFERENCES}, "did you mean 1, as in the references, by "
         "'1.png'? 3 such pairs differ only in type (a number on one side, text on the other), "
         "suffix"),
        ({}, "(ids 1, 2, 3); there is no image in common"),
    ],
)  # fmt: skip
def test_nothing_in_common_is_explained(tmp_path, references, capsys, allow, captions, message):
    assert run("--references", references, "--hypotheses",
               results(tmp_path / "h.json", captions), *allow) == 1  # fmt: skip
    refusal = capsys.readouterr().err
    assert message in refusal
    assert "there is no image in common" in refusal
    assert "--allow-missing" not in refusal


def test_allow_missing_is_not_suggested_where_ids_are_misspelt(tmp_path, references, capsys):
    given = results(tmp_path / "h.json", {1: "a", 2: "b", "3": "c"})
    assert run("--references", references, "--hypotheses", given) == 1
    refusal = capsys.readouterr().err
    assert "did you mean 3, as in the references, by '3'? they differ only in type" in refusal
    assert "--allow-missing" not in refusal


def test_a_file_without_captions_is_no_reference(tmp_path, capsys):
    references = coco(tmp_path / "r.json", {key: [] for key in REFERENCES})
    assert run("--references", references, "--hypotheses", results(tmp_path / "h.json")) == 1
    assert "3 images have no reference (ids 1, 2, 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "result", "kind"),
    [("a.jpg", "A.JPG", "upper and lower case"), ("a.jpg", "a.png", "suffix"),
     ("val/a.jpg", "a.jpg", "folder"), ("val/a.jpg", "val\\a.jpg", "slashes")],
)  # fmt: skip
def test_names_that_are_spelt_differently_are_explained(tmp_path, capsys, name, result, kind):
    (tmp_path / "r.csv").write_text(f"image,caption\n{name},a dog\nb.jpg,a cat\n")
    given = results(tmp_path / "h.json", {result: "a dog", "b.jpg": "a cat"})
    assert run("--references", tmp_path / "r.csv", "--hypotheses", given) == 1
    expected = f"did you mean {name!r}, as in the references, by {result!r}? they differ only in "
    assert expected + kind in capsys.readouterr().err


def test_references_of_several_splits_read_whole_say_so(tmp_path, good, capsys):
    images = [
        {"cocoid": key, "filename": f"{key}.jpg", "split": "test" if key < 3 else "train",
         "sentences": [{"raw": text} for text in texts]} for key, texts in REFERENCES.items()
    ]  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    assert run("--references", tmp_path / "k.json", "--hypotheses", good) == 0
    assert "the images of all splits are taken (test 2, train 1)" in capsys.readouterr().err
    given = results(tmp_path / "test.json", {key: GOOD[key] for key in (1, 2)})
    assert run("--references", tmp_path / "k.json", "--hypotheses", given) == 1
    expected = "--split takes one of the references' splits (test 2, train 1)"
    assert expected in capsys.readouterr().err
    common = ("--references", tmp_path / "k.json", "--hypotheses", given, "--split", "test")
    assert run(*common) == 0
    assert not capsys.readouterr().err
    assert run(*common, "--statistics", "--training-captions", tmp_path / "k.json") == 0
    assert "the images of all splits are taken" in capsys.readouterr().err


def test_result_files_may_have_any_name(tmp_path, references, capsys):
    for folder in ("caf\udce9", "$x^2$"):
        (tmp_path / folder).mkdir()
        results(tmp_path / folder / f"_<b>{'n' * 200}.json")
    outputs = ("--output", tmp_path / "s.json", "--per-image", tmp_path / "s.csv",
               "--plot", tmp_path / "p.svg", "--report", tmp_path / "page.html")  # fmt: skip
    given = (next(tmp_path.glob(f"{folder}*/*.json")) for folder in ("caf", "$x"))
    assert run("--references", references, "--hypotheses", *given, *outputs) == 0
    names = [f"caf\\udce9/_<b>{'n' * 200}.json", f"$x^2$/_<b>{'n' * 200}.json"]
    assert capsys.readouterr().out.startswith(f"{names[0]}\n")
    assert list(json.loads((tmp_path / "s.json").read_text())["scores"]) == names
    with (tmp_path / "s.csv").open(newline="") as file:
        assert {row["hypotheses"] for row in csv.DictReader(file)} == set(names)
    assert "caf\\udce9/_&lt;b&gt;" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_result_files_of_one_name_are_told_apart(tmp_path, references):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        results(tmp_path / folder / "captions.json")
    paths = [tmp_path / folder / "captions.json" for folder in "ab"]
    assert list(read_evaluation(references, paths).hypotheses) == [
        "a/captions.json",
        "b/captions.json",
    ]
    with pytest.raises(UsageError, match="twice"):
        read_evaluation(references, paths[:1] * 2)


# --- what is written -----------------------------------------------------------------------------


def test_per_image_scores(tmp_path, references, good, bad):
    run("--references", references, "--hypotheses", good, bad, "--metrics", "BLEU-1,ROUGE-L",
        "--per-image", tmp_path / "s.csv")  # fmt: skip
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["hypotheses"], row["image_id"]) for row in rows] == [
        (name, str(key)) for name in ("good.json", "bad.json") for key in GOOD
    ]
    assert float(rows[0]["ROUGE-L"]) == 1
    assert rows[5]["caption"] == BAD[3]


def test_report_shows_images_and_escapes_text(tmp_path, references, good, bad):
    images = tmp_path / "images & more"
    images.mkdir()
    Image.new("RGB", (900, 600), "red").save(images / "1.jpg")
    (images / "2.jpg").write_bytes(b"not an image")
    common = ("--references", references, "--hypotheses", good, "--images", images)
    run(*common, "--metrics", "BLEU,CIDEr-D", "--report", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 1
    assert "&lt;b&gt;chess&lt;/b&gt; &amp; talk." in page
    assert "<b>" not in page
    assert "3.jpg is not in" in page
    assert page.index("Best by CIDEr-D") < page.index("Worst by CIDEr-D")
    assert all(page.count(f"<small>{key}</small>") == 1 for key in GOOD)
    assert "<small>p = " not in page
    given = ("--hypotheses", good, bad, "--confidence", "--report", tmp_path / "two.html")
    run("--references", references, *given, "--output", tmp_path / "two.json")
    page = (tmp_path / "two.html").read_text(encoding="utf-8")
    summary = json.loads((tmp_path / "two.json").read_text())
    low, high = summary["confidence_95"]["bad.json"]["BLEU-1"]
    assert f"<small>{low:.4f} to {high:.4f}</small>" in page
    comparison = summary["comparisons"][0]
    assert f"{comparison['difference']:+.4f}<br><small>p = {comparison['p']:.3f}" in page
    run(*common, "--link-images", "--report", tmp_path / "linked.html")
    linked = (tmp_path / "linked.html").read_text(encoding="utf-8")
    assert 'src="images%20%26%20more/1.jpg"' in linked


def test_plot(tmp_path, references, good, bad, capsys):
    common = ("--references", references, "--hypotheses", good, bad)
    assert run(*common, "--plot", tmp_path / "p.png") == 0
    with Image.open(tmp_path / "p.png") as image:
        assert min(image.size) > 100
        assert len(image.convert("L").getcolors()) > 10
    assert run(*common, "--plot", tmp_path / "p.gif") == 2
    with pytest.raises(UsageError, match="png"):
        write_plot(tmp_path / "p", {})


def test_wandb_run_holds_the_scores(tmp_path, references, good, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run("--references", references, "--hypotheses", good, "--wandb", "scores", "--output",
        tmp_path / "s.json", "--report", tmp_path / "page.html")  # fmt: skip
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wandb_files.wait_for_exit(file)
    logged = {key: value for row in wandb_files.history(file) for key, value in row.items()}
    expected = compute_metrics(GOOD, REFERENCES)
    assert {name: logged[f"evaluation/{name}"] for name in expected} == expected
    assert "images:3" in logged["evaluation/signature"]
    assert list(file.parent.glob("files/media/html/**/*.html"))
