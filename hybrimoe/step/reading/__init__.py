"""What the layers of a recorded step compute, as the compiled step describes it: by their own modules and values."""
