"""Captioning goes on with smaller batches where memory runs out."""

import weakref

import torch

from captioner.data.listing import find_images
from captioner.inference.folder import caption_files


def test_what_a_failed_try_held_is_free_before_the_next(captioner, drawn, monkeypatch):
    images, search = find_images(drawn.images), captioner.search()
    expected, _ = caption_files(captioner, images, search, len(images), workers=0)
    caption, held, sizes = captioner.captions, [], []

    def scarce(pixels, *rest, **options):
        assert all(tensor() is None for tensor in held)
        sizes.append(len(pixels))
        if len(pixels) > 2:
            activations = torch.zeros(len(pixels), 1000)
            held.append(weakref.ref(activations))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")
        return caption(pixels, *rest, **options)

    monkeypatch.setattr(captioner, "captions", scarce)
    found, failed = caption_files(captioner, images, search, len(images), workers=0)
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert len(held) == 2
    assert not failed
    texts = {name: best[0].text for name, best in expected.items()}
    assert {name: best[0].text for name, best in found.items()} == texts
