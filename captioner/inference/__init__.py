"""Captions for images, from Python and for folders."""
