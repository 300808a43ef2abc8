"""Packs: a model converted once into one folder that needs nothing else, and the checks that it is whole."""
