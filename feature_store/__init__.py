"""Feast: definitions from the spec, materialisation, packed online and offline reads."""
