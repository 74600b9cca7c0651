"""The project keeps its shape: imports go one way, and what is written twice agrees."""

import ast
import graphlib
import re
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from captioner.experiment_file import load_config, load_stages

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "captioner"
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.toml"))
HEAVY = {"torch", "torchvision"}

# From the ground up: a package may import from itself and from those on earlier lines alone.
LEVELS = [
    {"ground"},
    {"data"},
    {"search", "metrics"},
    {"models", "runtime"},
    {"training", "inference", "page"},
    {"service"},
    {"commands", "top"},
    {"tools", "experiments"},
]
# What must work, and at once, where torch is slow to import or missing.
WITHOUT_TORCH = {
    *("errors", "files", "progress", "cli", "checks", "config", "version", "data.tokenizer"),
    *("data.vocabulary", "data.annotations", "data.predictions", "data.image_files"),
    *("data.image_formats", "data.preprocessing", "search.rules", "search.hypothesis", "memory"),
    "search.consensus",
    *("runtime", "runtime.captioner", "runtime.beam_search", "runtime.exported"),
}
MOST_LINES, MOST_LINES_OF_FUNCTION = 452, 46  # about 450 and 45


def modules() -> dict[str, Path]:
    """Return the project's modules, "captioner.metrics.bleu" say, but not its tests."""
    found = {}
    for folder in ("captioner", "tools", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def package_of(module: str) -> str:
    """Return the package that a module belongs to: "data", or "ground" for captioner.errors.

    "top" is captioner/__init__.py, which is for users alone.
    """
    top, *rest = module.split(".")
    if top != "captioner":
        return top
    if not rest:
        return "top"
    path = PACKAGE.joinpath(*rest[:1])
    return rest[0] if path.is_dir() else "ground"


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
    """Return which of the project's modules a module imports; packages only where named alone."""
    known = modules()
    named = imports(known[name]) & known.keys() - {name}
    return {each for each in named if not any(other.startswith(f"{each}.") for other in named)}


def all_imports(name: str) -> set[str]:
    """Return which of the project's modules are imported with a module."""
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
    assert {
        "captioner.models.decoder",
        "captioner.models.encoder",
    } <= own_imports("captioner.models.captioning_model")
    assert "captioner.models.recurrent" in all_imports("captioner.inference.captioner")
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages | {"ground", "top", "tools", "experiments"} == set().union(*LEVELS)


def test_packages_import_in_one_direction(capsys):
    """Prints the graph: pytest -s -k one_direction."""
    counts: Counter[tuple[str, str]] = Counter()
    for name in modules():
        for imported in own_imports(name):
            pair = (package_of(name), package_of(imported))
            if pair[0] != pair[1]:
                counts[pair] += 1
    with capsys.disabled():
        print()
        for importer, imported in sorted(counts):
            print(f"{importer:12} -> {imported:12} {counts[importer, imported]}")
    level = {package: number for number, packages in enumerate(LEVELS) for package in packages}
    for importer, imported in counts:
        assert level[imported] < level[importer], f"{importer} imports {imported}"


def test_no_module_imports_itself_round_about():
    order = graphlib.TopologicalSorter({name: own_imports(name) for name in modules()})
    assert len(list(order.static_order())) == len(modules())


def test_no_module_of_a_package_imports_the_top():
    """``from captioner import Captioner`` is for users."""
    for name, path in modules().items():
        if name.startswith("captioner"):
            assert "captioner" not in imports(path), name


def test_text_and_scores_need_no_torch():
    metrics = {name for name in modules() if name.startswith("captioner.metrics")}
    for name in {f"captioner.{name}" for name in WITHOUT_TORCH} | metrics:
        for each in (name, *all_imports(name)):
            heavy = {found.partition(".")[0] for found in imports(modules()[each])} & HEAVY
            if each == "captioner.data.preprocessing":  # for a tensor alone: its own test below
                heavy.clear()
            assert not heavy, f"{name} imports {each}, which imports {heavy}"


def test_preprocessing_imports_torch_for_a_tensor_alone():
    tree = ast.parse((PACKAGE / "data/preprocessing.py").read_text(encoding="utf-8"))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "captioner.data.image_files" in top
    assert not {name.partition(".")[0] for name in top} & HEAVY


def test_search_knows_no_model_and_models_no_training():
    for name in modules():
        known = {package_of(each) for each in all_imports(name)}
        if package_of(name) == "search":
            assert not known & {"models", "metrics"}, name
        if package_of(name) == "models":
            assert "metrics" not in known, name


def test_commands_import_torch_only_when_they_run():
    for path in (PACKAGE / "commands").glob("*.py"):
        assert not {name.partition(".")[0] for name in imports(path)} & HEAVY, path.name


# --- sizes ------------------------------------------------------------------------------------


def test_modules_and_functions_are_short(capsys):
    """Prints a table: pytest -s -k short."""
    rows = []
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        lengths = {
            node.name: (node.end_lineno or 0) - node.lineno + 1
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        longest = max(lengths, key=lengths.__getitem__, default="")
        rows.append((name, len(text.splitlines()), longest, lengths.get(longest, 0)))
    with capsys.disabled():
        print()
        for name, lines, longest, length in rows:
            print(f"{name:44} {lines:4}  {longest} {length}")
    for name, lines, longest, length in rows:
        if name.startswith("captioner"):
            assert lines <= MOST_LINES, f"{name} has {lines} lines"
        assert length <= MOST_LINES_OF_FUNCTION, f"{name}: {longest} has {length} lines"


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
    for extra in ("heic", "metadata", "onnx", "serve", "demo", "page"):
        asked |= bounds(extras[extra])
    asked |= bounds(["ray>=2.40"])
    names = {
        "PIL": "pillow",
        "pillow_heif": "pillow-heif",
        "prometheus_client": "prometheus-client",
    }
    here = {"captioner", "experiments", *(path.stem for path in (ROOT / "tools").glob("*.py"))}
    for folder in ("captioner", "tools", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in {each.partition(".")[0] for each in imports(path)}:
                if name not in here and name not in sys.stdlib_module_names:
                    package = names.get(name, name.replace("_", "-"))
                    assert package in asked, f"{path} imports {name}"


# --- experiments and README -------------------------------------------------------------------


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_experiments_hold_no_unknown_setting(path):
    load_stages(path)


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
    return [line.split()[0] for line in block[1].splitlines() if not line.startswith("   ")]


def test_the_readme_maps_every_file(readme):
    folders = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    tops = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    folders.append("pretrained")  # data alone
    assert sorted(listed(readme, "captioner")) == sorted([*tops, *(f"{f}/" for f in folders)])
    block = readme[readme.index("captioner/ ") : readme.index("experiments/ ")]
    for folder in folders:
        for path in (PACKAGE / folder).glob("*.py"):
            assert path.stem.startswith("__") or re.search(rf"\b{path.stem}\b", block), path
    tools = {path.name for path in (ROOT / "tools").iterdir() if path.suffix in (".py", ".sh")}
    assert sorted(listed(readme, "tools")) == sorted(tools)


def test_the_readme_names_nothing_that_is_not_there(readme):
    """Tools, experiments and linked files; and every setting that a command line changes."""
    for path in set(re.findall(r"\b(?:tools|experiments|captioner)/[\w/]+\.[a-z]+\b", readme)):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / path).exists(), path
    fields = load_stages(EXPERIMENTS[0])[0].config.to_dict()
    for section, name in re.findall(rf"\b({'|'.join(fields)})\.([a-z_]+)\b", readme):
        if name != "py":  # captioner/training.py is no setting
            assert name in fields[section], f"{section}.{name}"
