"""Draw images with their captions below them into one picture, to look at results at a glance."""

import random
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from captioner.cli import HelpFormatter, Parser, command
from captioner.data.annotations import ImageId, image_path, read_annotations
from captioner.data.image_files import load_thumbnail
from captioner.data.predictions import read_predictions
from captioner.errors import DataError, UsageError, name_some
from captioner.files import atomic_write

MARGIN = 8
MOST_LINES = 12  # of one caption


def draw_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int, size: int
) -> Image.Image:
    """Return one picture: each image within ``size`` x ``size`` pixels, its captions below.

    Args:
        images: What is shown.
        captions: Of each image; where it has several, with line breaks between them.
        columns: Images in a row.
        size: Side of the square that an image fills, in pixels.
    """
    font = ImageFont.load_default(size=13)
    wrapped = [
        [line for caption in several.split("\n") for line in _wrap(caption, size) or [""]]
        for several in captions
    ]
    text_height = 16 * max(len(lines) for lines in wrapped)
    width, height = size + MARGIN, size + text_height + 2 * MARGIN
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x = MARGIN + number % columns * width
        y = MARGIN + number // columns * height
        sheet.paste(ImageOps.contain(image, (size, size)), (x, y))
        pen.multiline_text((x, y + size + 2), "\n".join(lines), fill="black", font=font)
    return sheet


def _wrap(caption: str, size: int) -> list[str]:
    width = max(4, size // 7)
    return textwrap.wrap(caption, width, max_lines=MOST_LINES, placeholder=" …")


def choose(files: Sequence[Path], count: int, seed: int | None) -> dict[ImageId, str]:
    """Return the captions of some images, those of several files with numbers below each other.

    Args:
        files: Results files.
        count: So many images are chosen.
        seed: Draws them at random; None takes the first ones.

    Raises:
        DataError: There are none, or a file lacks the caption of a chosen image.
    """
    results = [read_predictions(file) for file in files]
    names = list(results[0])
    if seed is not None:
        random.Random(seed).shuffle(names)
    if not names:
        raise DataError(f"{files[0]}: no captions to show")
    for file, captions in zip(files, results, strict=True):
        if missing := [name for name in names[:count] if name not in captions]:
            raise DataError(f"{file}: no caption of {name_some(missing)}, which {files[0]} has")
    if len(results) == 1:
        return {name: results[0][name] for name in names[:count]}
    return {
        name: "\n".join(f"{n}: {captions[name]}" for n, captions in enumerate(results, 1))
        for name in names[:count]
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw some images of a results file."""
    parser = Parser("contact_sheet.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("captions", type=Path, help="results file, as caption_folder.py wrote it")
    parser.add_argument("folder", type=Path, help="folder of the images")
    parser.add_argument("--annotations", type=Path, help="captions file whose ids the results use")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.png)")
    parser.add_argument(
        "--beside",
        type=Path,
        nargs="+",
        default=[],
        metavar="CAPTIONS",
        help="further results files: the captions of all are shown, numbered from 1",
    )
    parser.add_argument("--seed", type=int, help="draw the images at random; else the first ones")
    parser.add_argument("--count", type=int, default=8, help="images shown")
    parser.add_argument("--columns", type=int, default=4, help="images in a row")
    parser.add_argument("--size", type=int, default=180, help="side of an image, in pixels")
    args = parser.parse_args(argv)
    for option in ("count", "columns", "size"):
        if getattr(args, option) < 1:
            raise UsageError(f"--{option} must be at least 1, found {getattr(args, option)}")
    results = choose([args.captions, *args.beside], args.count, args.seed)
    listed = read_annotations(args.annotations).images if args.annotations else []
    file_names = {image.image_id: image.file_name for image in listed}
    paths = [image_path(args.folder, file_names.get(key) or str(key)) for key in results]
    images = [load_thumbnail(path, args.size) for path in paths]
    columns = min(args.columns, len(images))
    sheet = draw_sheet(images, list(results.values()), columns, args.size)
    with atomic_write(args.output, "wb") as file:
        sheet.save(file, "PNG", optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
