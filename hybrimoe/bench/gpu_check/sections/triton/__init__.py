"""Kernels of the kit, imported where Triton is there only."""
