"""RULER: 13 synthetic tasks, answered by generation and scored by string match."""
