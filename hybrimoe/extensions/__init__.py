"""Policies of other authors: found by name, file or entry point, and checked against the contract."""
