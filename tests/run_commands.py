"""Commands, run in the tests' own process."""

from pathlib import Path

from captioner.commands.caption import main


def run_caption(checkpoint: Path, folder: Path, output: Path, *options: object) -> int:
    words = [checkpoint, folder, "--output", output, "--device", "cpu", "--workers", 0, *options]
    return main([str(word) for word in words])
