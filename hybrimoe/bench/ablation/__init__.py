"""Simulates every policy on every trace and machine."""
