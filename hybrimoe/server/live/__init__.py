"""What a server tells of the model while it runs: lanes, slots, memory, a step in detail; and what can be changed."""
