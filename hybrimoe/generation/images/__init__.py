"""Images in prompts: read, turned into what the model sees of them, and computed beside the text."""
