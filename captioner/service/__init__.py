"""Captions over HTTP: ``captioner serve``."""
