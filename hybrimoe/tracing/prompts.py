"""Prompts that `hybrimoe trace record` uses where none are given: the demo model's three kinds of text."""

from __future__ import annotations

DEFAULT_PROMPTS = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "Emma was sitting by the window when her father came into the room and said",
    "The family of Dashwood had long been settled in the county, and their house",
    "She could not help thinking of what had passed between them at the ball,",
    "In the beginning God created the heaven and the earth. And the earth was",
    "And it came to pass in those days that the king went up to the city, and",
    "Blessed are they that hear the word, for they shall",
    "The LORD said unto Moses, Speak unto the children of Israel, saying,",
    "The CREATE TABLE command creates a new table in the current database. The options",
    "To restore a backup with pg_dump, first stop the server and then",
    "An index can be used to speed up queries that select rows by",
    "The query planner estimates the cost of each plan from the statistics that",
)
