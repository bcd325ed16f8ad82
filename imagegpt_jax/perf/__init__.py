"""Ahead-of-time compilation and what compiled programs say."""
