"""Measures a server under load."""
