"""Weights of published systems in and out; see `formats.FORMATS` for which, and docs/weights.md for the matrix."""
