"""What `hybrimoe chat` does once the model is open: messages, commands, replies."""
