"""What watches over the project runs what the README's test command runs."""

from pathlib import Path

import yaml

from captioner.version import __version__

ROOT = Path(__file__).parents[1]


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_and_ci_run_the_test_command():
    workflow = read_yaml(".github/workflows/test.yml")
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert commands == ["bash tools/test.sh"]
    assert workflow["permissions"] == {"contents": "read"}
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "exec bash tools/test.sh"


def test_hooks_run_what_the_test_command_runs():
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    script = (ROOT / "tools/test.sh").read_text(encoding="utf-8")
    for hook in repository["hooks"]:
        assert hook["entry"] in script, hook["entry"]
    assert script.count(".venv/bin/") == len(repository["hooks"])


def test_the_citation_names_this_version():
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == __version__
    assert citation["license"] == "MIT"
