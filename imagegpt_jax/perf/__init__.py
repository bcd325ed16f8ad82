"""Programs compiled ahead of time, and what they communicate."""
