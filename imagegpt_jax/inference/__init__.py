"""Trained networks, loaded and placed on devices, ready to call."""
