"""Run by the layout test as a program, on several processes: the logits of a model cut in a layout.

    layout_logits.py CHECKPOINT HF_FOLDER TOKENS.pt OUTPUT.pt [Megatron flags]

The model is loaded twice, from the Megatron checkpoint and straight from the Hugging Face folder, each
time over other random weights. Writes {"checkpoint": logits, "straight": logits}, [b, s, v].
"""

import sys
from pathlib import Path

import torch

from megatron_long.engine import host_backend

host_backend.install()

from megatron_long.conversion import run_ends  # noqa: E402
from megatron_long.engine import megatron_adapter  # noqa: E402
from megatron_long.flags.backend import HOST, join_or_start_job  # noqa: E402
from megatron_long.model.attention import zigzag_shard, zigzag_unshard  # noqa: E402
from megatron_long.model.geometry import geometry_from_hf  # noqa: E402


def build(checkpoint: Path, folder: Path, seq_length: int, flags: list[str]) -> tuple:
    """The model chunks of this rank, and the flags."""
    join_or_start_job()
    megatron_adapter.install_patches()
    args = megatron_adapter.parse_flags(
        [
            *HOST.to_argv(),
            *geometry_from_hf(folder).to_argv(),
            *("--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"),
            *("--load", str(checkpoint), "--no-load-optim", "--no-load-rng", "--skip-train"),
            *("--exit-on-missing-checkpoint", "--sequence-parallel", "--eval-iters", "0"),
            *("--micro-batch-size", "1", "--train-iters", "1", "--lr", "0"),
            *("--seq-length", str(seq_length)),
            *flags,
        ]
    )
    megatron_adapter.validate_flags(args)
    return megatron_adapter.build_model_chunks(args), args


def logits_of(chunks: list, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [b, s, v] on the last stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    rank, cp = (
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )
    positions = torch.arange(tokens.size(1))[None]
    local = [zigzag_shard(whole, rank, cp, dim=1) for whole in (tokens, positions)]

    def step(_iterator: None, model: torch.nn.Module) -> tuple:
        return model(*local, None), lambda output, **_: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(chunks),
            model=chunks,
            num_microbatches=parallel_state.get_pipeline_model_parallel_world_size(),
            seq_length=tokens.size(1),
            micro_batch_size=tokens.size(0),
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage():
            return None
        whole = gather_from_tensor_model_parallel_region(outputs[0]).contiguous()
        shards = [torch.empty_like(whole) for _ in range(cp)]
        torch.distributed.all_gather(
            shards, whole, group=parallel_state.get_context_parallel_group()
        )
    return zigzag_unshard(shards, dim=1)


def main() -> None:
    """Load twice, compute twice, write from the last rank."""
    from megatron.training.checkpointing import load_checkpoint

    checkpoint, folder, tokens_path, output, *flags = sys.argv[1:]
    tokens = torch.load(tokens_path)
    chunks, args = build(Path(checkpoint), Path(folder), tokens.size(1), flags)
    loaders = {
        "checkpoint": lambda: load_checkpoint(chunks, None, None),
        "straight": lambda: run_ends.filler(Path(folder), lambda: args.padded_vocab_size)(chunks),
    }
    logits = {}
    for name, load in loaders.items():
        for chunk in chunks:
            chunk.eval()
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        load()
        logits[name] = logits_of(chunks, tokens)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        torch.save(logits, output)
    megatron_adapter.leave_process_group()


if __name__ == "__main__":
    main()
