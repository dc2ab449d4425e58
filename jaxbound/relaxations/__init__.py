"""Relaxations: the interpreters, what they share, and the enclosures that they ask."""
