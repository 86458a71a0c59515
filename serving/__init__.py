"""Merged inference: gateway and merge worker."""
