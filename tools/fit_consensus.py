r"""Fit to a checkpoint what an image lets expect of its captions, by which they can be ranked.

  fit_consensus.py runs/best/best --annotations dataset_flickr8k.json --split train \
      --images Images --output runs/best/with_consensus

The images and captions must be those of training, no others: see captioner/training/consensus.py.
The new checkpoint differs by its file consensus.safetensors, and by search.consensus, the weight,
which is best chosen on the validation split: captioner caption ... --consensus 0.5, say.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captioner.checkpoint_directory import CONFIG_FILE, CONSENSUS_FILE, find_checkpoint
from captioner.checksums import write_checksums
from captioner.cli import HelpFormatter, Parser, command
from captioner.data.annotations import image_path, read_annotations
from captioner.data.images import in_batches, load_pixels
from captioner.data.tokenizer import tokenize
from captioner.errors import CheckpointError, DataError, UsageError
from captioner.files import atomic_directory, read_json, write_json
from captioner.inference.captioner import Captioner
from captioner.models.checkpoint import write_tensors
from captioner.models.consensus import Consensus
from captioner.progress import Progress, log_line
from captioner.training.consensus import fit_consensus

BATCH = 64


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory, or a name")
    parser.add_argument("--annotations", type=Path, required=True, help="captions file")
    parser.add_argument("--split", help="of the annotations, the one of training")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--weight", type=float, default=1.0, help="search.consensus there")
    parser.add_argument("--ngrams", type=int, default=4000, help="n-grams that are expected")
    parser.add_argument("--rank", type=int, default=64, help="of the regression's matrix")
    parser.add_argument("--ridge", type=float, default=0.05, help="share of the mean variance")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    for name in ("weight", "ngrams", "rank", "ridge"):
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name}: more than 0 was expected, found {getattr(args, name)}")
    if args.output.exists():
        raise UsageError(f"--output {args.output}: it is there already")
    checkpoint = find_checkpoint(args.checkpoint)
    captioner = Captioner.from_pretrained(checkpoint, args.device)
    images = read_annotations(args.annotations, args.split).images
    paths = [image_path(args.images, str(image.file_name)) for image in images]
    features, seen = _features(captioner, paths)
    captions = [[tokenize(text) for text in images[index].captions] for index in seen]
    vocabulary = captioner.model.vocabulary
    consensus = fit_consensus(features, captions, vocabulary, args.ngrams, args.rank, args.ridge)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(args.output) as folder:
        _write(checkpoint, folder, consensus, args.weight)
    print(
        f"{args.output}: {len(consensus.bias)} n-grams, from {len(seen)} images; score it on the "
        "validation split"
    )
    return 0


def _features(captioner: Captioner, paths: Sequence[Path]) -> tuple[np.ndarray, list[int]]:
    """Return the mean features of the images that can be read, (M, D), and which these are."""
    features, seen = [], []
    batches = in_batches(len(paths), BATCH)
    with Progress("encoding", len(paths), "image") as bar:
        for batch in load_pixels(paths, captioner.preprocessing, batches, captioner.device):
            for _, message in batch.failures:
                log_line(f"warning: {message}")
            if batch.indices:
                features.append(captioner.features(batch.pixels)[0].float().mean(1).cpu().numpy())
                seen += batch.indices
            bar.update(len(batch.indices) + len(batch.failures))
    if len(seen) < 2:
        raise DataError(f"{len(seen)} images can be read; two or more are needed to fit anything")
    return np.concatenate(features), seen


def _write(checkpoint: Path, folder: Path, consensus: Consensus, weight: float) -> None:
    """Copy a checkpoint's files, with another consensus."""
    for path in checkpoint.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    write_tensors(folder / CONSENSUS_FILE, consensus.tensors())
    config = read_json(folder / CONFIG_FILE, CheckpointError)
    config["search"]["consensus"] = weight
    write_json(folder / CONFIG_FILE, config)
    write_checksums(folder)


if __name__ == "__main__":
    raise SystemExit(main())
