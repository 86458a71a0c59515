"""From a trained version to what runs it: Triton and device programs."""
