"""Hugging Face to Megatron checkpoints and back, from one mapping table."""
