"""What the hardware and the model's shape are, and what work costs on them."""
