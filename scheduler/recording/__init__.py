"""A recorded run: every input and plan, so that it can be replayed and checked."""
