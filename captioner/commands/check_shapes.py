"""Check captions of the rendered scenes against what the pictures show.

Each caption is read with a grammar; objects, colours, sizes and relation count as right in a
picture when all that it shows of them is named and true. A picture without a caption is wrong.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, Parser, command, program_name
from captioner.data.predictions import read_predictions
from captioner.data.shape_captions import Verdict, captions_of, check_captions, shares
from captioner.data.shapes import Record
from captioner.data.shapes_dataset import read_records
from captioner.errors import UsageError
from captioner.files import write_json
from captioner.progress import log_line


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = Parser(
        program_name("check_shapes", "check_shapes.py"),
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--scenes", type=Path, required=True, help="scenes_SPLIT.json of the data set"
    )
    parser.add_argument(
        "--hypotheses",
        type=Path,
        required=True,
        help="results file (.json, .jsonl or .csv); ids are image ids or file names",
    )
    parser.add_argument("--output", type=Path, help="write shares and wrong captions here as JSON")
    parser.add_argument(
        "--at-least",
        type=float,
        metavar="SHARE",
        help="exit with code 1 when the share (0 to 1) that is wholly right is below this",
    )
    parser.add_argument("--examples", type=int, default=5, help="wrong captions to show")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    if options.at_least is not None and not 0 <= options.at_least <= 1:
        raise UsageError(f"--at-least must be a share from 0 to 1, found {options.at_least}")
    records = read_records(options.scenes)
    captions = read_predictions(options.hypotheses)
    verdicts, captions_by_id = check_captions(records, captions)
    if len(captions) < len(records):
        missing = len(records) - len(captions)
        log_line(
            f"warning: {missing} of {len(records)} pictures have no caption and count as wrong"
        )
    right = shares(verdicts)
    for part, share in right.items():
        print(f"{part.replace('_', ' '):12}  {share:.4f}")
    wrong = _wrong(records, verdicts, captions_by_id)
    for entry in wrong[: options.examples]:
        log_line(
            f"wrong: {entry['file_name']}: {entry['caption']!r}; the picture shows "
            f"{entry['truth']!r}"
        )
    if options.output:
        write_json(options.output, {**right, "images": len(records), "wrong": wrong})
    return int(options.at_least is not None and right["wholly_right"] < options.at_least)


def _wrong(
    records: Sequence[Record], verdicts: Mapping[int, Verdict], captions: Mapping[int, str]
) -> list[dict[str, object]]:
    """Return the captions that aren't wholly right, each beside a true one."""
    return [
        {
            "image_id": record.image_id,
            "file_name": record.file_name,
            "caption": captions[record.image_id],
            "truth": captions_of(record.scene)[0],
        }
        for record in records
        if not verdicts[record.image_id].wholly_right
    ]
