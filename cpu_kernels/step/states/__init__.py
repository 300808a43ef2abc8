"""Layers that keep a state of a text in place of keys and values: convolutions, linear attention, Mamba."""
