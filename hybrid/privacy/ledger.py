"""The durable account of privacy spent."""
