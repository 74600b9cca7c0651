"""Write the tokens of hard captions by the official Java tool, for the tests to compare with.

The golden file holds the captions too, so that it can be made again: ``[caption, tokens]`` a line,
the tokens joined by spaces. It needs Java and the extra ``official``.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, Parser, command
from captioner.data.tokenizer import tokenize
from captioner.files import atomic_write, read_json, read_text
from captioner.metrics.official import java_tokenize

GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "golden_tokens.jsonl"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="the file to renew")
    parser.add_argument("--add", type=Path, help="JSON list of further captions to put into it")
    options = parser.parse_args(argv)
    lines = read_text(options.golden).splitlines() if options.golden.exists() else []
    captions = [json.loads(line)[0] for line in lines]
    if options.add:
        captions += read_json(options.add)
    captions = list(dict.fromkeys(captions))
    tokens = java_tokenize(captions)
    with atomic_write(options.golden) as file:
        for caption, words in zip(captions, tokens, strict=True):
            # ASCII: a line separator in a caption must not look like one of the file's.
            file.write(json.dumps([caption, " ".join(words)]) + "\n")
    differing = [
        (caption, words)
        for caption, words in zip(captions, tokens, strict=True)
        if tokenize(caption) != words
    ]
    print(f"{len(captions)} captions; captioner.tokenizer differs on {len(differing)}")
    for caption, words in differing:
        print(json.dumps([caption, words, tokenize(caption)], ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
