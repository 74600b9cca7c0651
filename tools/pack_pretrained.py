"""Put a checkpoint into the package, its large weights in float16, after comparing its captions.

  pack_pretrained.py runs/best/best mobilenet-flickr8k --annotations captions_val.json --images DIR

The images are captioned in float32 by both. Where fewer than 99% of the captions are the same, or
the files take more than 25 MB, nothing is written. MODEL_CARD.md, which a person writes, is kept.
A file that was once committed stays in the history: replace it seldom.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from captioner.checkpoint_directory import CARD_FILE, CONFIG_FILE, PRETRAINED_DIR, find_checkpoint
from captioner.cli import HelpFormatter, Parser, command
from captioner.data.listing import ImageFile, listed_images
from captioner.errors import CaptionerError, CheckpointError
from captioner.files import atomic_directory, read_json
from captioner.inference.captioner import Captioner
from captioner.inference.folder import caption_files
from captioner.models.checkpoint import save_checkpoint

LEAST_EQUAL = 0.99
MOST_BYTES = 25_000_000


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory, or a run's folder")
    parser.add_argument("name", help="what it is called in the package")
    parser.add_argument("--annotations", type=Path, required=True, help="captions file of images")
    parser.add_argument("--images", type=Path, required=True, help="their folder")
    parser.add_argument("--split", help="the images of this split alone")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    checkpoint, target = find_checkpoint(args.checkpoint), PRETRAINED_DIR / args.name
    images = listed_images(args.images, args.annotations, args.split)
    original = Captioner.from_pretrained(checkpoint, precision="float32")
    scores = read_json(checkpoint / CONFIG_FILE, CheckpointError)["scores"]
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder)
        save_checkpoint(original.model, packed, scores, torch.float16)
        _check_size(packed)
        _check_captions(original, Captioner.from_pretrained(packed, precision="float32"), images)
    with atomic_directory(target) as written:
        if (target / CARD_FILE).exists():
            shutil.copy(target / CARD_FILE, written)
        save_checkpoint(original.model, written, scores, torch.float16)
    print(f"{target} is written; its {CARD_FILE} is yours to write")
    return 0


def _check_size(directory: Path) -> None:
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{size:,} bytes")
    if size > MOST_BYTES:
        raise CaptionerError(f"at most {MOST_BYTES:,} bytes were expected, found {size:,}")


def _check_captions(one: Captioner, other: Captioner, images: Sequence[ImageFile]) -> None:
    captions = [_captions(captioner, images) for captioner in (one, other)]
    equal = sum(captions[0][name] == captions[1][name] for name in captions[0])
    print(f"{equal} of {len(captions[0])} captions are the same in float16")
    if equal < LEAST_EQUAL * len(captions[0]):
        raise CaptionerError(f"at least {LEAST_EQUAL:.0%} the same captions were expected")


def _captions(captioner: Captioner, images: Sequence[ImageFile]) -> dict[object, str]:
    captions, _ = caption_files(captioner, images, captioner.search())
    return {image_id: best[0].text for image_id, best in captions.items()}


if __name__ == "__main__":
    raise SystemExit(main())
