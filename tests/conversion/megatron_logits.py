"""Run by the parity test as a program: a checkpoint loaded by Megatron's own training code.

    megatron_logits.py CHECKPOINT TOKENS.pt OUTPUT.pt [Megatron flags]

Writes the logits, and what the model's own `sharded_state_dict` names. A process of its own keeps
Megatron's global state, and the host backend, out of the other tests.
"""

import sys
from pathlib import Path

import torch

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
    """Load, run one forward pass, write."""
    checkpoint, tokens_path, output, *flags = sys.argv[1:]
    tokens = torch.load(tokens_path)
    scorer = open_scorer(Path(checkpoint), context_length=tokens.size(1), megatron_argv=flags)
    positions = torch.arange(tokens.size(1))[None].expand_as(tokens)
    with torch.no_grad():
        logits = scorer.model(tokens, positions, None).float()
    shapes, objects = describe_state(scorer.model)
    axes = {
        name: parameter.partition_dim
        for name, parameter in scorer.model.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }
    torch.save({"logits": logits, "shapes": shapes, "objects": objects, "axes": axes}, output)
    scorer.close()


if __name__ == "__main__":
    main()
