"""Llama on Megatron-Core: geometry, layer specification, portable context-parallel attention."""
