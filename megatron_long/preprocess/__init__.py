"""A run from corpus to dataset: stages, executors, work folder, progress."""
