"""The files that models come in: safetensors, pickles, GGUF."""
