"""How weights lie in memory: specifications, packing, quantisation, bit planes, and the slow reference."""
