"""Token scores of a sharded Megatron model: loss and greedy match of each label, in one forward pass.

Legend: b batch, s sequence of the whole window, h hidden, v padded vocabulary; rank-local sizes carry
`/cp` or `/tp`. The full logits [s, b, v] are never built: the output layer is applied to the positions
that have a label, a chunk of them at a time, and of each chunk three numbers a token are kept.
"""

import contextlib
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_long.checkpoint.choosing import require_checkpoint
from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError
from megatron_long.evaluation.batches import TokenScores
from megatron_long.model.labels import UNSCORED
from megatron_long.model.linear_cross_entropy import (
    VocabularyShard,
    chunk_statistics,
    chunks,
    combine,
    gather_statistics,
    multiply,
)

if TYPE_CHECKING:
    from megatron_long.model.geometry import LlamaGeometry

KERNEL_TILE_TOKENS = 128
"""Padded lengths are multiples of it on GPUs, where kernels of attention and FP8 want whole tiles."""


def shard_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard
) -> Tensor:
    """Reduce a vocabulary shard's logits to what scoring needs, a chunk of positions at a time.

    Args:
        hidden: Hidden states [n, h] of n positions.
        weight: Rows of the output layer [v/tp, h].
        labels: Token ids [n], int64; `UNSCORED` allowed.
        shard: Which rows these are.
    Returns: [3, n] float32: log-sum-exp of the shard's logits, their maximum, and the label's logit
        (-inf if the label is not in the shard).
    """
    rows = weight[: shard.num_real_rows(weight.size(0))]
    local = labels - shard.first
    statistics = hidden.new_empty(3, labels.numel(), dtype=torch.float32)
    for part in chunks(labels.numel(), rows.size(0)):
        logits = multiply(hidden[part], rows.t())
        statistics[:, part] = chunk_statistics(logits, local[part])
    return statistics


def combine_statistics(shards: Tensor, labels: Tensor) -> TokenScores:
    """Put the statistics of all vocabulary shards together.

    Args:
        shards: [tp, 3, n] of `shard_statistics`.
        labels: Token ids [n].
    """
    _, losses = combine(shards, labels)
    is_top = shards[:, 2].amax(dim=0) >= shards[:, 1].amax(dim=0)
    return TokenScores(losses, is_top | (labels == UNSCORED))


class Scorer:
    """A model in its layout, a checkpoint's or one in training, that scores batches of rows.

    Every rank of a replica calls `score` with the same tokens; replicas (data-parallel ranks) may be
    given different ones, of different shapes.

    Args:
        model: This rank's part of the model, with or without Megatron's wrappers.
        context_length: Longest row, tokens.
        vocab_size: Real tokens; padding rows of the output layer get no probability.
        sequence_parallel: Whether tensor-parallel ranks split the sequence outside of attention.
        on_batch: Called before each batch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        context_length: int,
        vocab_size: int,
        sequence_parallel: bool = True,
        on_batch: Callable[[], None] | None = None,
    ) -> None:
        from megatron.core import parallel_state

        self.model = model
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.on_batch = on_batch
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        self.is_writer = torch.distributed.get_rank() == 0
        cp = parallel_state.get_context_parallel_world_size()
        tp = parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1
        self.layout_step = (2 * cp if cp > 1 else 1) * tp
        whole_tiles = 1 if host_backend.is_installed() else KERNEL_TILE_TOKENS
        self.length_step = math.lcm(self.layout_step, whole_tiles)

    def score(self, tokens: Tensor, labels: Tensor) -> TokenScores:
        """Score a batch; collective over the ranks of this replica.

        Args:
            tokens: [b, s] int64, s up to `context_length`.
            labels: [b, s] int64, what should follow each token; `UNSCORED` where nothing is asked.
        Returns: Scores in sequence order, on the CPU, the same on every rank of the replica.
        Raises: ConfigError: a wrong length, or a label beyond the vocabulary.
        """
        self._check(tokens, labels)
        if self.on_batch is not None:
            self.on_batch()
        with torch.no_grad():
            local = self._forward(tokens, labels)
            whole = self._collect(local, tokens.shape)
        return TokenScores(whole[0].cpu(), whole[1].cpu() > 0.5)

    def gather(self, value: Any) -> list:
        """Collect a picklable object from every data-parallel rank, in rank order, on each."""
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group()
        gathered: list[Any] = [None] * self.data_parallel_size
        torch.distributed.all_gather_object(gathered, value, group=group)
        return gathered

    def agree(self, value: Any) -> Any:
        """Give every rank of the job the value of rank 0, which may be any picklable object."""
        shared = [value]
        torch.distributed.broadcast_object_list(shared, src=0)
        return shared[0]

    def close(self) -> None:
        """Leave the process group."""
        from megatron_long.engine.megatron_adapter import leave_process_group

        leave_process_group()

    def _check(self, tokens: Tensor, labels: Tensor) -> None:
        length = tokens.size(1)
        is_whole = length % self.layout_step == 0 and length <= self.context_length
        if not is_whole or tokens.shape != labels.shape:
            raise ConfigError(
                f"tokens {tuple(tokens.shape)} and labels {tuple(labels.shape)} must both be "
                f"[batch, length], of a length that is a multiple of {self.layout_step} and at most "
                f"{self.context_length}, the context length the model was opened with"
            )
        top = max(int(tokens.max()), int(labels.max()))
        if top >= self.vocab_size or int(tokens.min()) < 0 or int(labels.min()) < UNSCORED:
            raise ConfigError(
                f"a token id {top} is outside the model's vocabulary of {self.vocab_size}; the text "
                "was made with another tokenizer than the model's"
            )

    def own_shard(self, whole: Tensor) -> Tensor:
        """Give the part of [b, s] that this context-parallel rank holds, [b, s/cp]."""
        from megatron.core import parallel_state

        from megatron_long.model.attention import zigzag_shard

        rank = parallel_state.get_context_parallel_rank()
        return zigzag_shard(whole, rank, parallel_state.get_context_parallel_world_size(), dim=1)

    def _forward(self, tokens: Tensor, labels: Tensor) -> Tensor | None:
        """What `_measure` gives of this rank's shard [2, b, s/cp]; None before the last stage."""
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        device = torch.cuda.current_device()
        own = [self.own_shard(whole.to(device)) for whole in (tokens, labels, positions)]
        return self._run(own[0], own[1], own[2])

    def _run(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor | None:
        """Run the stages on this rank's tokens, labels and positions [b, s/cp]."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(_iterator: None, model: torch.nn.Module) -> tuple:
            processor = self._output_processor
            output = model(tokens, positions, None, labels=labels, output_processor=processor)
            return output, lambda output, **_: output

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[self.model],
            num_microbatches=1,
            seq_length=tokens.size(1) * parallel_state.get_context_parallel_world_size(),
            micro_batch_size=tokens.size(0),
            forward_only=True,
            collect_non_loss_data=True,
        )
        return outputs[0] if parallel_state.is_pipeline_last_stage() else None

    def _output_processor(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Any,
        labels: Tensor,
        **_: Any,
    ) -> Tensor:
        """Replace output layer and loss: hidden [s/cp(/tp), b, h] -> [2, b, s/cp]."""
        hidden, weight, shard = self._output_parts(hidden_states, output_layer, output_weight)
        flat_labels = labels.transpose(0, 1).reshape(-1)  # hidden states run sequence first
        asked = torch.nonzero(flat_labels != UNSCORED)[:, 0]
        both = torch.zeros(2, flat_labels.numel(), device=flat_labels.device)
        both[1] = 1.0
        both[:, asked] = self._measure(hidden[asked], weight, flat_labels[asked], shard)
        return both.view(2, labels.size(1), labels.size(0)).transpose(1, 2).contiguous()

    def _measure(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard
    ) -> Tensor:
        """Loss of each label [n], and whether it is the likeliest token: [2, n]."""
        from megatron.core import parallel_state

        local = shard_statistics(hidden, weight, labels, shard)
        group = parallel_state.get_tensor_model_parallel_group()
        scores = combine_statistics(gather_statistics(local, group), labels)
        return torch.stack([scores.losses, scores.is_greedy.float()])

    def _output_parts(
        self, hidden_states: Tensor, output_layer: Any, output_weight: Any
    ) -> tuple[Tensor, Tensor, VocabularyShard]:
        """Hidden states [s/cp * b, h], sequence first, and this rank's rows of the output layer."""
        from megatron.core import parallel_state, tensor_parallel

        if output_layer.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
        weight = output_layer.weight if output_weight is None else output_weight
        first = parallel_state.get_tensor_model_parallel_rank() * weight.size(0)
        shard = VocabularyShard(first, self.vocab_size)
        return hidden_states.reshape(-1, hidden_states.size(-1)), weight, shard

    def _collect(self, local: Tensor | None, shape: torch.Size) -> Tensor:
        """Put the shards of the context-parallel ranks in order, and give them to all stages."""
        from megatron.core import parallel_state

        from megatron_long.model.attention import zigzag_unshard

        if local is not None:
            cp = parallel_state.get_context_parallel_world_size()
            shards = [torch.empty_like(local) for _ in range(cp)]
            torch.distributed.all_gather(
                shards, local, group=parallel_state.get_context_parallel_group()
            )
            local = zigzag_unshard(shards, dim=-1).contiguous()
        return self._share(local, shape)

    def _share(self, whole: Tensor | None, shape: torch.Size) -> Tensor:
        """Give all stages what the last one has [2, b, s]."""
        from megatron.core import parallel_state

        if whole is None:
            whole = torch.empty(2, *shape, device=torch.cuda.current_device())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                whole,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return whole


def open_scorer(
    checkpoint: Path | None,
    *,
    context_length: int,
    megatron_argv: Sequence[str],
    precision: str | None = None,
    hf_config: Path | None = None,
    check_hashes: bool = True,
    tool_flags: Sequence[str] = (),
    iteration: str | None = None,
    weights: str = "auto",
    kind: type[Scorer] = Scorer,
) -> Scorer:
    """Load a checkpoint in the layout of the flags; under torchrun, every rank calls this.

    Args:
        checkpoint: Megatron checkpoint folder with its `hf_config.json`, which gives the shape and
            RoPE; None takes a freshly initialised model of the shape of `hf_config`.
        context_length: Longest row to score, tokens.
        megatron_argv: The user's Megatron flags: layout, `--ckpt-step`, `--rotary-base`.
        precision: `bf16` or `fp32`; None is bf16 on GPUs, fp32 on the host.
        hf_config: Hugging Face folder or config.json; None is the checkpoint's.
        check_hashes: Whether the checkpoint's files are compared with their hashes; each rank reads a share.
        tool_flags: Flags of the calling tool, which a mistyped one may mean.
        iteration: Which checkpoint of the folder, a number or `release`; None is that of `--ckpt-step`, or
            the newest. Every rank takes that of rank 0.
        weights: Which of the checkpoint's weights, one of `checkpoint.megatron_folder.WEIGHTS`.
        kind: `Scorer`, or `evaluation.generation.shard_generator.ShardGenerator`.
    Raises: ConfigError: no checkpoint there, or a layout that cannot be cut. DataError: it is damaged.
    """
    host_backend.install()
    from megatron_long.engine import megatron_adapter
    from megatron_long.evaluation.pinning import pin_checkpoint, pin_weights
    from megatron_long.flags.backend import join_or_start_job
    from megatron_long.flags.layout_rules import check_layout

    if checkpoint is not None:
        require_checkpoint(checkpoint, "--checkpoint")
    geometry = _geometry(checkpoint, hf_config)
    megatron_adapter.install_patches()
    world_size = join_or_start_job()
    args = _parse(checkpoint, geometry, context_length, megatron_argv, precision, tool_flags)
    check_layout(args, world_size)
    if checkpoint is not None:
        path = pin_checkpoint(checkpoint, args, check_hashes, iteration)
        pin_weights(path, weights)
    with contextlib.redirect_stdout(
        sys.stderr
    ):  # Megatron's own lines; the result alone is the output
        megatron_adapter.validate_flags(args, quiet=True)
        model = megatron_adapter.load_model_for_scoring(args)
    return kind(
        model,
        context_length=context_length,
        vocab_size=geometry.vocab_size,
        sequence_parallel=args.sequence_parallel,
    )


def check_flags(
    checkpoint: Path | None,
    *,
    context_length: int,
    megatron_argv: Sequence[str],
    precision: str | None = None,
    hf_config: Path | None = None,
    tool_flags: Sequence[str] = (),
) -> None:
    """Parse the flags as `open_scorer` does, with its arguments, and end there.

    Raises: ConfigError: Megatron does not know a flag, or not this value.
    """
    host_backend.install()
    geometry = _geometry(checkpoint, hf_config)
    _parse(checkpoint, geometry, context_length, megatron_argv, precision, tool_flags)


def _geometry(checkpoint: Path | None, hf_config: Path | None) -> "LlamaGeometry":
    from megatron_long.checkpoint.sidecars import hf_config_path
    from megatron_long.model.geometry import geometry_from_hf

    if checkpoint is not None:
        hf_config = hf_config or hf_config_path(checkpoint)
    assert hf_config is not None, "a model of random weights needs a shape"
    return geometry_from_hf(hf_config)


def _parse(
    checkpoint: Path | None,
    geometry: "LlamaGeometry",
    context_length: int,
    megatron_argv: Sequence[str],
    precision: str | None,
    tool_flags: Sequence[str],
) -> Namespace:
    """Give Megatron's settings for scoring; the user's flags come after ours."""
    from megatron_long.engine import megatron_adapter
    from megatron_long.flags.backend import PRECISION_ARGV, detect_backend

    backend = detect_backend()
    precision = precision or ("bf16" if backend.cuda else "fp32")
    if precision == "fp32":  # Transformer Engine's fused attention takes 16 bits only
        backend = replace(backend, transformer_engine=False)
    argv = [*backend.to_argv(), *PRECISION_ARGV[precision], *geometry.to_argv()]
    argv += _scoring_argv(checkpoint, geometry, context_length)
    argv += [*megatron_argv, "--seq-length", str(context_length)]
    return megatron_adapter.parse_flags(argv, tool_flags=tool_flags)


def _scoring_argv(
    checkpoint: Path | None, geometry: "LlamaGeometry", context_length: int
) -> list[str]:
    longest = max(context_length, geometry.max_position_embeddings)
    argv = [
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(geometry.vocab_size)),
        *("--skip-train", "--sequence-parallel", "--eval-iters", "0"),
        *("--micro-batch-size", "1", "--train-iters", "1", "--lr", "0"),
        *("--max-position-embeddings", str(longest)),
    ]
    if checkpoint is not None:
        argv += ["--load", str(checkpoint), "--no-load-optim", "--no-load-rng"]
        argv.append("--exit-on-missing-checkpoint")
    return argv
