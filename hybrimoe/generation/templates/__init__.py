"""Chat templates: what form of message one takes, and how long it may run."""
