"""Fused expert kernels in Triton that read packed records; import only where Triton is installed."""
