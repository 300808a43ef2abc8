"""The planner of a layer call: decide, place, move; which policies it runs and how it explains itself."""
