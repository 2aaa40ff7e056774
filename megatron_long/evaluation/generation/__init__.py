"""Greedy generation with a key-value cache, on the shards of a model."""
