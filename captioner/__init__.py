"""captioner: a pretrained CNN encoder and a recurrent decoder turn an image into a sentence."""

__version__ = "0.1.0"
