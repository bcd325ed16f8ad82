"""Readers of safetensors and PyTorch files, without PyTorch."""
