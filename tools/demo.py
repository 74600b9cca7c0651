"""A demonstration to click on, with Gradio: captions of a photograph, and what each word looked at.

  pip install '.[demo]'
  python tools/demo.py

A Hugging Face Space runs it as it is: a copy of this repository whose README.md begins with

  ---
  sdk: gradio
  sdk_version: 6.31.0
  app_file: tools/demo.py
  ---

and a requirements.txt with one line, "." (Gradio comes with the Space). It was tried with Gradio
6.31.0 and Pillow 12.3.0. For other programs, and for strangers' images, there is captioner serve.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import UsageError
from captioner.inference.captioner import Caption, Captioner
from captioner.inference.gallery import AttentionMaps, cut_of

if TYPE_CHECKING:
    import gradio

SHOWN = 320  # pixels of the shorter side of what is shown of a photograph
DARKEST = 0.8  # of what a word didn't look at


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="checkpoint directory or name of a captioner"
    )
    parser.add_argument("--port", type=int, help="port; Gradio looks for one from 7860 on")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the demonstration until it is stopped."""
    args = _parser().parse_args(argv)
    page = build(Captioner.from_pretrained(args.checkpoint))
    page.queue(max_size=32, default_concurrency_limit=1).launch(server_port=args.port)
    return 0


def build(captioner: Captioner) -> "gradio.Interface":
    """Return the demonstration of a captioner.

    Raises:
        UsageError: Gradio isn't installed.
    """
    try:
        import gradio
    except ImportError:
        raise UsageError("the demonstration needs Gradio: pip install 'captioner[demo]'") from None
    cut = cut_of(captioner.model.encoder.preprocessing)

    def caption(
        image: Image.Image | None, count: int, beam_size: int
    ) -> tuple[str, list[tuple[Image.Image, str]]]:
        if image is None:
            raise gradio.Error("Choose a photograph first.")
        found = captioner.describe(
            image, n_best=int(count), beam_size=max(int(count), int(beam_size)), attention=True
        )
        return "\n".join(each.text for each in found), show_attention(image, found[0], cut)

    return gradio.Interface(
        caption,
        inputs=[
            gradio.Image(type="pil", sources=["upload", "webcam", "clipboard"], label="photograph"),
            gradio.Slider(1, 5, value=3, step=1, label="captions"),
            gradio.Slider(1, 20, value=5, step=1, label="beam size"),
        ],
        outputs=[
            gradio.Textbox(label="captions, best first", lines=5),
            gradio.Gallery(label="what each word of the best looked at", columns=4),
        ],
        title="captioner",
        description="A small captioner: a CNN looks at a photograph, a recurrent decoder writes.",
        flagging_mode="never",
    )


def show_attention(
    image: Image.Image, caption: Caption, cut: float
) -> list[tuple[Image.Image, str]]:
    """Return the photograph for each word, dark where the decoder didn't look.

    Args:
        image: The photograph.
        caption: Its caption, with the attention; without it nothing is shown.
        cut: See ``AttentionMaps``.
    """
    maps = AttentionMaps.of(caption, cut)
    if maps is None:
        return []
    image = image.convert("RGB")
    scale = SHOWN / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    side = cut * min(image.size)
    width, height = (round(side), round(side)) if cut else image.size
    place = (image.width - width) // 2, (image.height - height) // 2
    shown = []
    for word, values in zip(maps.words, maps.maps, strict=True):
        grid = Image.fromarray(np.array(values, dtype=np.uint8).reshape(maps.size))
        looked = Image.new("L", image.size)
        looked.paste(grid.resize((width, height), Image.Resampling.BICUBIC), place)
        dark = Image.blend(Image.new("RGB", image.size), image, 1 - DARKEST)
        shown.append((Image.composite(image, dark, looked), word))
    return shown


if __name__ == "__main__":
    raise SystemExit(main())
