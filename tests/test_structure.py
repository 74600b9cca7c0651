"""The project keeps its shape: imports go one way, and what is written twice agrees."""

import ast
import graphlib
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

from captioner.config import load_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "captioner"
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.toml"))
HEAVY = {"torch", "torchvision"}

# What must work, and at once, where torch is slow to import or missing.
WITHOUT_TORCH = {
    *("errors", "files", "progress", "cli", "tokenizer", "vocabulary", "annotations"),
    *("results", "evaluation", "report", "config"),
    *("metrics", "metrics.bleu", "metrics.rouge", "metrics.cider", "metrics.official"),
    *("metrics.significance", "metrics.diversity"),
}
# From an image to a sentence: none may know one after it.
WAY = ["images", "encoder", "features", "decoder", "model", "captioner", "folder"]
# Parts that must not know each other, whichever the order.
STRANGERS = [
    ("search", "decoder"),
    ("search", "encoder"),
    ("decoder", "encoder"),
    ("data", "encoder"),
]
KNOWS_ALL = {"training"}


def modules() -> dict[str, Path]:
    """Return the library's modules, "metrics.bleu" say, without its commands."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and parts[0] != "commands":
            found[name] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """Return all that a file imports, inside functions too, by full dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own_imports(name: str) -> set[str]:
    """Return which of the library's modules a module imports."""
    known = modules()
    own = [each for each in imports(known[name]) if each.startswith("captioner.")]
    return {each.removeprefix("captioner.") for each in own} & known.keys() - {name}


def all_imports(name: str) -> set[str]:
    """Return which of the library's modules are imported with a module."""
    found: set[str] = set()
    left = {name}
    while left:
        new = own_imports(left.pop()) - found
        found |= new
        left |= new
    return found


# --- imports ----------------------------------------------------------------------------------


def test_the_graph_is_that_of_the_project():
    """Guards the tests below against reading no imports at all."""
    assert {"torch", "captioner.errors"} <= imports(PACKAGE / "device.py")
    assert {"decoder", "encoder", "search"} <= own_imports("model")
    assert {"errors", "images", "recurrent"} <= all_imports("model")
    assert set(modules()) >= {*WITHOUT_TORCH, *WAY, *KNOWS_ALL}


def test_no_module_imports_itself_round_about():
    order = graphlib.TopologicalSorter({name: own_imports(name) for name in modules()})
    assert len(list(order.static_order())) == len(modules())


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_text_and_scores_need_no_torch(name):
    for each in (name, *all_imports(name)):
        heavy = {found.partition(".")[0] for found in imports(modules()[each])} & HEAVY
        assert not heavy, f"{name} imports {each}, which imports {heavy}"


def test_commands_import_torch_only_when_they_run():
    for path in (PACKAGE / "commands").glob("*.py"):
        assert not {name.partition(".")[0] for name in imports(path)} & HEAVY, path.name


def test_the_way_from_image_to_sentence_goes_in_one_direction():
    for position, name in enumerate(WAY):
        assert not all_imports(name) & set(WAY[position + 1 :]), name
    for one, other in STRANGERS:
        assert other not in all_imports(one), f"{one} knows {other}"


def test_only_training_and_commands_know_all():
    for name in set(modules()) - KNOWS_ALL:
        known = all_imports(name)
        assert "training" not in known, name
        assert "tracking" not in known, name
        assert not any(each.startswith("captioner.commands") for each in imports(modules()[name]))
    assert {"metrics", "data"}.isdisjoint(all_imports("folder") | all_imports("captioner"))


def test_every_module_says_what_it_is():
    for folder in ("captioner", "tools", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


# --- packages ---------------------------------------------------------------------------------


def bounds(requirements: list[str]) -> dict[str, str]:
    """Split "name>=version" into name and version."""
    pairs = [re.fullmatch(r"([a-z0-9_-]+)>=([0-9.]+)", text) for text in requirements]
    assert all(pairs), requirements
    return {pair[1]: pair[2] for pair in pairs if pair}


def test_conda_and_pip_ask_for_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    assert pip == ["--editable ."]
    wanted = bounds([entry for entry in conda if isinstance(entry, str) and entry != "pip"])
    assert f">={wanted.pop('python')}" == project["requires-python"]
    wanted["torch"] = wanted.pop("pytorch")  # conda-forge's name for it
    extras = project["optional-dependencies"]
    assert wanted == bounds([*project["dependencies"], *extras["report"]])


def test_every_package_that_the_library_imports_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = bounds([*project["dependencies"], *extras["report"], *extras["official"]])
    names = {"PIL": "pillow"}
    for folder in ("captioner", "tools", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in {each.partition(".")[0] for each in imports(path)}:
                if name not in {"captioner", "experiments"} and name not in sys.stdlib_module_names:
                    assert names.get(name, name) in asked, f"{path} imports {name}"


# --- experiments and README -------------------------------------------------------------------


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_experiments_hold_no_unknown_setting(path):
    load_config(path)


def test_the_sweep_changes_settings_that_exist():
    sweep = yaml.safe_load((ROOT / "experiments/sweep.yaml").read_text(encoding="utf-8"))
    assert (ROOT / sweep["program"]).is_file()
    experiment = next(word for word in sweep["command"] if word.endswith(".toml"))
    for name, setting in sweep["parameters"].items():
        for value in setting.get("values") or [setting["min"], setting["max"]]:
            load_config(ROOT / experiment, [f"{name}={value}"])


@pytest.fixture
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_says_how_to_set_up(readme):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} or later" in readme
    for words in (
        "bash tools/quickstart.sh",
        "bash tools/test.sh",
        "conda env create --file environment.yml",
        "pip install --editable .",
    ):
        assert words in readme
    name = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["name"]
    assert f"conda activate {name}" in readme


def listed(readme: str, folder: str) -> list[str]:
    """Return the entries below a folder in the README's map of the files."""
    block = re.search(rf"^{folder}/ .*\n((?:  .*\n)+)", readme, re.MULTILINE)
    assert block, f"the README has no map of {folder}/"
    return [line.split()[0] for line in block[1].splitlines()]


def test_the_readme_maps_every_file_in_the_order_of_imports(readme):
    tops = [name for name in modules() if "." not in name]
    library = [name.removesuffix(".py").removesuffix("/") for name in listed(readme, "captioner")]
    assert sorted(library) == sorted([*tops, "commands"])
    for position, name in enumerate(library[:-1]):
        later = own_imports(name) & set(library[position:])
        assert not later, f"the README lists {name} before {later}, which it imports"
    tools = {path.name for path in (ROOT / "tools").iterdir() if path.suffix in (".py", ".sh")}
    assert sorted(listed(readme, "tools")) == sorted(tools)


def test_the_readme_names_nothing_that_is_not_there(readme):
    """Tools, experiments and linked files; and every setting that a command line changes."""
    for path in set(re.findall(r"\b(?:tools|experiments|captioner)/[\w/]+\.[a-z]+\b", readme)):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / path).exists(), path
    fields = load_config(EXPERIMENTS[0]).to_dict()
    for section, name in re.findall(rf"\b({'|'.join(fields)})\.([a-z_]+)\b", readme):
        if name != "py":  # captioner/training.py is no setting
            assert name in fields[section], f"{section}.{name}"
