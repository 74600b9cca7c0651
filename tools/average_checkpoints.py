"""Average the weights of checkpoints into a new one (Izmailov et al. 2018, arXiv 1803.05407).

  average_checkpoints.py runs/a/best runs/b/best --output averaged

It helps where they began with the same checkpoint (training.init_from) and so lie near each other:
say, runs that differ in their seed or learning rate. For others use caption_folder.py --ensemble.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from captioner.checkpoint_directory import find_checkpoint
from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import CheckpointError, UsageError
from captioner.files import atomic_directory
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import load_checkpoint, save_checkpoint


def average_weights(models: Sequence[CaptioningModel]) -> CaptioningModel:
    """Give the first model the mean of all models' weights; return it.

    Raises:
        CheckpointError: They differ in vocabulary, CNN, preprocessing or decoder.
    """
    first, *others = models
    for number, other in enumerate(others, 2):
        for what, same in {
            "vocabulary": other.vocabulary.words == first.vocabulary.words,
            "CNN": other.encoder.name == first.encoder.name
            and other.encoder.last_stage == first.encoder.last_stage
            and other.encoder.padding == first.encoder.padding,
            "preprocessing": other.encoder.preprocessing == first.encoder.preprocessing,
            "decoder": other.decoder.config == first.decoder.config,
        }.items():
            if not same:
                raise CheckpointError(f"checkpoint {number} differs from the first in its {what}")
    states = [model.state_dict() for model in models]
    mean = {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        for name, tensor in states[0].items()
    }
    first.load_state_dict(mean)
    first.consensus, first.search = None, replace(first.search, consensus=0.0)  # not the mean's
    return first


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser: argparse.ArgumentParser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoint directories")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write")
    args = parser.parse_args(argv)
    if len(args.checkpoints) < 2:
        raise UsageError("two checkpoints or more are needed for an average")
    if args.output.exists():
        raise UsageError(f"--output {args.output}: it is there already")
    model = average_weights([load_checkpoint(find_checkpoint(p)) for p in args.checkpoints])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(args.output) as folder:
        save_checkpoint(model, folder, scores={})
    print(f"{args.output} is the average of {len(args.checkpoints)} checkpoints; score it anew")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
