"""Mechanisms, accountants and the ledger."""
