"""One file for each fault of Megatron that is repaired here: what, in which version, and when it can go."""
