"""Clipping, noise and bounds; NumPy only."""
