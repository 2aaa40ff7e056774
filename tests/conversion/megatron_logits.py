"""Run by the parity tests as a program: a checkpoint loaded by Megatron's own training code.

    megatron_logits.py CHECKPOINT CASES.pt OUTPUT.pt [Megatron flags]

CASES holds `{name: (tokens [b, s], positions [s])}`. Writes the logits of each, and what the model's own
`sharded_state_dict` names. A process of its own keeps Megatron's global state, and the host backend,
out of the other tests.
"""

import sys
from pathlib import Path

import torch

from megatron_long.conversion.logits_check import rotated_at
from megatron_long.evaluation.scoring import open_scorer


def describe_state(model: torch.nn.Module) -> tuple[dict, list[str]]:
    """Shapes of the tensors in a checkpoint, and the keys of what is no tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        apply_factories,
    )

    state = model.sharded_state_dict()
    apply_factories(state)
    values = list(nested_values(state))
    shapes = {v.key: tuple(v.global_shape) for v in values if isinstance(v, ShardedTensor)}
    return shapes, [value.unique_key for value in values if isinstance(value, ShardedObject)]


def main() -> None:
    """Load, run a forward pass for each case, write."""
    checkpoint, cases_path, output, *flags = sys.argv[1:]
    cases = torch.load(cases_path)
    longest = max(tokens.size(1) for tokens, _ in cases.values())
    scorer = open_scorer(Path(checkpoint), context_length=longest, megatron_argv=flags)
    model = scorer.model
    logits = {}
    for name, (tokens, positions) in cases.items():
        with torch.no_grad(), rotated_at(model.rotary_pos_emb, positions):
            logits[name] = model(tokens, positions[None].expand_as(tokens), None).float()
    shapes, objects = describe_state(model)
    axes = {
        name: parameter.partition_dim
        for name, parameter in model.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }
    torch.save({"logits": logits, "shapes": shapes, "objects": objects, "axes": axes}, output)
    scorer.close()


if __name__ == "__main__":
    main()
