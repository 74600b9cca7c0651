"""Weights & Biases: logins, and the line that syncs a run."""

import shlex

import pytest

from captioner.commands.train import main as train_main
from captioner.config import WandbConfig
from captioner.errors import ConfigError
from captioner.training.tracking import Tracker


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_online_without_a_login_is_refused_before_anything(
    experiment, tmp_path, monkeypatch, capsys, no_login
):
    argv = [str(experiment), "wandb.mode=online", "--output-dir", str(tmp_path / "run")]
    assert train_main(argv) == 1
    assert capsys.readouterr().err == (
        "error: wandb.mode=online: log in with `wandb login` or WANDB_API_KEY, or set "
        "wandb.mode=offline\n"
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "onlin")
    assert train_main(argv) == 1
    assert "error: WANDB_MODE=onlin: one of auto, online, offline" in capsys.readouterr().err


def test_a_login_for_another_host_is_one_line(tmp_path, no_login):
    (tmp_path / "netrc").write_text(f"machine elsewhere.example\nlogin user\npassword {'a' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    with pytest.raises(ConfigError, match=r"^wandb: No API key configured.*or set wandb\.mode="):
        Tracker(WandbConfig(mode="online"), {}, tmp_path)


def test_the_line_that_syncs_a_run_can_be_pasted(tmp_path, capsys, no_login):
    folder = tmp_path / "a run"
    folder.mkdir()
    Tracker(WandbConfig(mode="offline"), {}, folder).finish()
    (run,) = folder.glob("wandb/offline-run-*")
    line = capsys.readouterr().err.splitlines()[-1]
    assert shlex.split(line.partition("show the run there: ")[2]) == ["wandb", "sync", str(run)]
