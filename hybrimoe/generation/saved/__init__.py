"""Conversations on disk: as a file of messages, and as a session with keys and values."""
