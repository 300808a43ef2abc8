"""Quantised formats of Hugging Face checkpoints: how their tensors are named, and how they become plain weights."""
