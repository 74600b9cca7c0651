"""Which cells and numbers of layers each decoder takes: what tests of all decoders run over."""

from itertools import product

from captioner.models.captioning_model import DECODERS
from captioner.models.recurrent_cells import CELLS

# Of the decoders that don't take all.
KIND_CELLS = {"adaptive_attention": ("lstm",)}
KIND_LAYERS = {"up_down": (1,)}

KINDS = tuple(DECODERS)
ATTENDING_KINDS = tuple(kind for kind in KINDS if kind != "show_and_tell")
KINDS_AND_CELLS = [
    (kind, cell) for kind, cell in product(KINDS, CELLS) if cell in KIND_CELLS.get(kind, CELLS)
]
KINDS_CELLS_AND_LAYERS = [
    (kind, cell, layers)
    for (kind, cell), layers in product(KINDS_AND_CELLS, (1, 2))
    if layers in KIND_LAYERS.get(kind, (1, 2))
]


def most_layers(kind: str) -> int:
    """Return the largest number of layers, 1 or 2, that a decoder takes."""
    return max(KIND_LAYERS.get(kind, (1, 2)))
