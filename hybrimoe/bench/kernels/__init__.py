"""Measures expert kernels beside those of other projects."""
