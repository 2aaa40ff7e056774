"""Estimates of a corpus from a part of it, and of what a mixture makes of it."""
