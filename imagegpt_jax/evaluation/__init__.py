"""Scores of checkpoints, image folders and prompts; votes; reports."""
