"""One file for each fault of Megatron that is repaired here."""
