"""Experiment files, studies, and what was measured."""
