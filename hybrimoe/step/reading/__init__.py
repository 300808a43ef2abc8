"""From a recorded step of a model to the description of its layers, compared with the layers themselves."""
