"""Meshes, logical axis rules, FSDP and manual collectives."""
