"""What the documents claim about speed and accuracy, measured: `python -m benchmarks.training`, `.accuracy`."""
