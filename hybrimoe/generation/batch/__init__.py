"""Many prompts at once: reading the job, ordering it, padding, and generating."""
