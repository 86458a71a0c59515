"""Real servers on one machine, for development."""
