"""What a reply's text holds: reasoning, the answer, and calls of tools in the form that the model's family writes."""
