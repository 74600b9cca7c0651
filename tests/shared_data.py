"""Where the real photographs, captions and weights are that some tests use; they skip without."""

from pathlib import Path

SHARED = Path(__file__).parents[2] / "shared"
