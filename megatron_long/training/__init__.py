"""From a recipe to a running Megatron job: flags, data, host backend, the Megatron adapter."""
