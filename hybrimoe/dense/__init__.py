"""The parts around the experts: packed linear layers, attention of decode steps, devices."""
