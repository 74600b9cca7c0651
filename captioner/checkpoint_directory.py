"""Where checkpoints are: in a directory, in a run's folder, or in the package, found by name.

The captioners that come with the package are checkpoints (see ``models.checkpoint``) in
``captioner/pretrained/NAME``, their weights in float16, with a model card beside them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.errors import CheckpointError, did_you_mean
from captioner.files import read_json, read_text
from captioner.progress import log_line

WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE = "model.safetensors", "config.json", "vocabulary.json"
CONSENSUS_FILE = "consensus.safetensors"  # not in each
CARD_FILE = "MODEL_CARD.md"
RUN_FILE = "run.json"

PRETRAINED_DIR = Path(__file__).parent / "pretrained"
DEFAULT_NAME = "mobilenet-flickr8k"


@dataclass(frozen=True)
class PretrainedCaptioner:
    """A captioner that comes with the package.

    Attributes:
        name: What it is called.
        directory: Its checkpoint.
        config: What its config.json holds.
        size: Of its files, in bytes.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    size: int

    @property
    def card(self) -> str:
        """Its model card, in Markdown."""
        return read_text(self.directory / CARD_FILE, CheckpointError)


def pretrained_captioners() -> list[PretrainedCaptioner]:
    """Return the captioners that come with the package, by name."""
    directories = [path.parent for path in sorted(PRETRAINED_DIR.glob(f"*/{WEIGHTS_FILE}"))]
    return [
        PretrainedCaptioner(
            directory.name,
            directory,
            read_json(directory / CONFIG_FILE, CheckpointError),
            sum(path.stat().st_size for path in directory.iterdir()),
        )
        for directory in directories
    ]


def is_pretrained(name: str | Path) -> bool:
    """Tell whether this is the name of a captioner that comes with the package."""
    name = str(name)
    return name == Path(name).name and (PRETRAINED_DIR / name / WEIGHTS_FILE).is_file()


def is_checkpoint(path: str | Path) -> bool:
    """Tell whether this is a folder with the files of a checkpoint, or with those of a run."""
    signs = (WEIGHTS_FILE,), (CONFIG_FILE, VOCABULARY_FILE), (RUN_FILE,), (f"best/{WEIGHTS_FILE}",)
    return any(all((Path(path) / name).is_file() for name in names) for names in signs)


def find_checkpoint(source: str | Path) -> Path:
    """Return the checkpoint directory that is meant.

    Args:
        source: A checkpoint directory; a run's folder, whose best checkpoint is taken; or the name
            of a captioner that comes with the package, where there is no such checkpoint.

    Raises:
        CheckpointError: There is neither such a directory nor such a name.
    """
    directory, best = Path(source), Path(source) / "best"
    if is_pretrained(source) and not is_checkpoint(directory):
        return PRETRAINED_DIR / source
    if not directory.exists() and len(directory.parts) == 1:
        names = [captioner.name for captioner in pretrained_captioners()]
        hint = did_you_mean(str(source), names) or "; captioner models lists the names there are"
        raise CheckpointError(f"{source}: no such checkpoint directory, and no name of one{hint}")
    is_run = best.is_dir() or (directory / RUN_FILE).is_file()
    if not is_run or (directory / CONFIG_FILE).exists():
        return directory
    log_line(f"{directory} is the folder of a run: its best checkpoint is used, {best}")
    return best


def default_checkpoint() -> Path:
    """Return the checkpoint that is used where none is named, and say so in a line.

    Raises:
        CheckpointError: This copy of the package has none.
    """
    if not is_pretrained(DEFAULT_NAME):
        raise CheckpointError(
            f"{PRETRAINED_DIR / DEFAULT_NAME}: this copy of the package comes without its trained "
            "captioner; name a checkpoint directory"
        )
    log_line(f"captioning with {DEFAULT_NAME}, which comes with the package: no other was named")
    return PRETRAINED_DIR / DEFAULT_NAME
