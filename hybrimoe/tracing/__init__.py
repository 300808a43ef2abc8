"""Routing traces of real models: where they come from, how they are recorded, reported and learned from."""

from __future__ import annotations
