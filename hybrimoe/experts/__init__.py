"""The module that takes the experts' place in a model, and how it reads the original."""
