"""One run: where it starts, its data, its micro-batches, its loss, and the callbacks that watch it."""
