"""Lets Megatron's distributed optimizer resume over torch's AdamW (no Transformer Engine, no Apex).

Upstream: megatron-core 0.19.2, loading asserts on optimizer state that does not exist yet, copies in place
into views of leaf parameters, restores a stale `step`, and misses `step` in fully reshardable checkpoints.
Remove when `tests/training/test_exact_resume.py` passes without it on a machine without Transformer Engine.
"""

import importlib

import torch

CHANGED_SYMBOLS = {
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer.sharded_state_dict",
        "DistributedOptimizer.load_state_dict",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
    ),
}
"""Symbols replaced if Adam is torch's own, by module."""


def fix_torch_adamw_resume() -> None:
    """Replace the three methods; does nothing with Transformer Engine or Apex."""
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if module.HAVE_APEX_OR_TE:
        return
    optimizer = module.DistributedOptimizer
    stock_sharded = optimizer.sharded_state_dict
    stock_load = optimizer.load_state_dict
    stock_set = optimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def sharded_state_dict(self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return stock_sharded(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        stock_load(self, state_dict)
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        for state in self.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], step)

    def set_states(self, model_param, tensors):
        stock_set(self, model_param, {**tensors, "step": None})

    optimizer.sharded_state_dict = sharded_state_dict
    optimizer.load_state_dict = load_state_dict
    optimizer._set_main_param_and_optimizer_states = set_states
