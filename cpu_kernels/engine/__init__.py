"""Drives the kernels: describes a call, shares its work among threads, and runs a whole layer of experts."""
