"""Losses: of pixels and discriminators, and chunked cross-entropy over a vocabulary."""
