"""Everything that depends on `megatron.training`.

`run.run_training` trains on Megatron's loop and fires the events of `callback.Callback`, `pausing` brackets
evaluations between two steps, `megatron_adapter` parses flags and builds models. `host_backend` comes first.
"""
