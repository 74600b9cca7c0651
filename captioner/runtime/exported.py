"""What ``captioner export`` writes into a folder.

    encoder.onnx      pixels (B, 3, S, S), uint8, to the first state and the memory of each image
    step.onnx         the last tokens (B, K), state and memory, to log-probabilities (B, K, V), the
                      new state and, with attention, the weights of the regions (B, K, N)
    ngrams.json       the n-grams that an image lets expect, for a captioner with a consensus
    export.json       preprocessing, search settings, precision
    vocabulary.json   the words in the order of their ids
    SHA256SUMS        what these files were when they were written

With ``ngrams.json`` the encoder's last output is ``expected`` (B, G): see ``search.consensus``.

A state is ``state_0``, … (B, K, H), and ``next_state_0``, … behind the step; the memory, which
belongs to images, is ``memory_0``, … (B, …).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.data.preprocessing import Preprocessing
from captioner.errors import CheckpointError
from captioner.files import read_json
from captioner.search_config import SearchConfig

ENCODER_FILE, STEP_FILE = "encoder.onnx", "step.onnx"
EXPORT_FILE, VOCABULARY_FILE = "export.json", "vocabulary.json"
NGRAMS_FILE = "ngrams.json"
FORMAT = 2  # 1: none had ngrams.json


@dataclass(frozen=True)
class ExportConfig:
    """What export.json holds.

    Attributes:
        captioner: Version of the package that wrote it.
        precision: Of the weights in the files: "float32", "float16" or "int8".
        regions: N, how many regions the decoder looks at, a square grid; 0 without attention.
        preprocessing: How an image becomes the pixels.
        search: How captions are found unless told otherwise.
        format: Of the folder.
    """

    captioner: str
    precision: str
    regions: int
    preprocessing: Preprocessing
    search: SearchConfig
    format: int = FORMAT

    @classmethod
    def read(cls, directory: Path) -> "ExportConfig":
        """Read export.json.

        Raises:
            CheckpointError: It isn't there, or isn't what this version can read.
            ConfigError: A setting is impossible.
        """
        path = directory / EXPORT_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{directory}: no exported captioner is there ({EXPORT_FILE} is missing); "
                "captioner export CHECKPOINT FOLDER makes one"
            )
        content = read_json(path, CheckpointError)
        try:
            if content["format"] not in range(1, FORMAT + 1):
                raise CheckpointError(
                    f"{path}: format {FORMAT} or earlier was expected, found {content['format']}; "
                    "export it again with this version of captioner"
                )
            parts = {
                "preprocessing": Preprocessing(**_tuples(content["preprocessing"])),
                "search": SearchConfig(**_tuples(content["search"])),
            }
            return cls(**(content | parts))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not what captioner export wrote ({error}); export it again"
            ) from None


def is_exported(directory: str | Path) -> bool:
    """Tell whether a folder is what ``captioner export`` wrote."""
    return (Path(directory) / EXPORT_FILE).is_file()


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
