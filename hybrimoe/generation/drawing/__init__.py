"""From scores to a token: which have a chance, and the random numbers that choose among them."""
