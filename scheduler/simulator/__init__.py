"""Plays a trace through the planner on a machine that is described by a profile."""
