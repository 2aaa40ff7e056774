"""A folder of Megatron checkpoints: which one, what is in it, is it whole, what trained it."""
