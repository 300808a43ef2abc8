"""Experts that do not fit host memory: layers of them alone, and whole models under a memory limit of the system."""
