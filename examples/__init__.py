"""Hybrid models to learn from, on real data."""
