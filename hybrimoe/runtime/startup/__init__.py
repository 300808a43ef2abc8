"""What runs once when a session starts: devices, budgets, backends, measurements."""
