"""Sampling from a decoder: settings, filters, the decoding loop and what is built on it. `generate.py` is its front."""
