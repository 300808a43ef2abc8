"""Compilation: Numba with this project's options, a cache on disk, and primitives that Numba lacks."""
