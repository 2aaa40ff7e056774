"""Prediction of a run before its start: memory, time, layouts; and the capabilities of this machine."""
