"""All that knows `megatron.training`: how it is called, and what is changed in it."""
