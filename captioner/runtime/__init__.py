"""Captions without torch, from what ``captioner export`` wrote.

Needs onnxruntime, numpy and Pillow alone:

    >>> from captioner.runtime import OnnxCaptioner
    >>> captioner = OnnxCaptioner("exported")
    >>> captioner.caption("dog.jpg", beam_size=5)
    'a dog is running on the beach'
"""

from captioner.runtime.captioner import OnnxCaption, OnnxCaptioner

__all__ = ["OnnxCaption", "OnnxCaptioner"]
