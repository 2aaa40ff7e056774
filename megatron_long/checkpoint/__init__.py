"""A folder of Megatron checkpoints: selection, content, integrity, and the run that wrote it."""
