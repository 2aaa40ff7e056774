"""One file for each fix of Megatron: what is wrong, in which version, and when it can be removed."""
