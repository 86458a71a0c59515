"""One page about a model: what was released, what is public, and what a simulation knows, each marked as such."""
