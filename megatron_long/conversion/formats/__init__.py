"""File formats of models: safetensors, pickles, GGUF."""
