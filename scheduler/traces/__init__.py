"""Recorded routing: reading, making, and analysing it, and turning it into demands."""
