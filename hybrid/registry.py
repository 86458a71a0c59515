"""Models, versions and aliases, kept by MLflow."""
