"""Federated training: populations, the vectorised engine, Flower apps and strategy."""
