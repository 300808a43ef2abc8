"""What earlier prompts and replies computed, kept in blocks of tokens for whatever prompt begins alike."""
