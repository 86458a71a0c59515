"""What is asked of a population besides training: clipped, noised, and in the ledger."""
