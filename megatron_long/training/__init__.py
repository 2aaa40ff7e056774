"""Training: where a run starts, its batches, its loss, and the callbacks that watch it."""
