"""How a prompt is computed: in which parts, in which order of layers, and what its own tokens' probabilities are."""
