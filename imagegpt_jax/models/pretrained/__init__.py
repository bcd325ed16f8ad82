"""Frozen networks whose weights come from elsewhere, one file each."""
