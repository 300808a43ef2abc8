"""Adapters that PEFT has written, merged into the weights of a checkpoint while these are read."""
