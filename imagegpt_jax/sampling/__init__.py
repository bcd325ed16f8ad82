"""Sampling from a decoder: settings, filters, the decoding loop and what is built on it. `sampling/jobs.py` is its
front.
"""
