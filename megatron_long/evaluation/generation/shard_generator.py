"""Greedy generation by a sharded Megatron model, whose parts are cut by tensor, context and pipeline
parallelism.

The prompts of a batch are read in one forward pass, as for scoring, which fills the caches of
`megatron_long.evaluation.generation.key_value_cache`; then each pass adds a token to every row.

Legend: b rows, s padded length of the prompts, h hidden, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_long.errors import ConfigError
from megatron_long.evaluation.batches import pad_length
from megatron_long.evaluation.generation.key_value_cache import CachedAttention, CacheState
from megatron_long.evaluation.hf_scorer import until_stop
from megatron_long.evaluation.scoring import Scorer
from megatron_long.model.labels import UNSCORED
from megatron_long.model.linear_cross_entropy import VocabularyShard, gather_statistics, multiply


class ShardGenerator(Scorer):
    """A scorer that also generates; every rank of a replica calls it with the same prompts."""

    stop_ids: Collection[int] = ()
    """Tokens that end an answer."""

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        from megatron.core import parallel_state

        super().__init__(model, **options)
        self.cache = CacheState(parallel_state.get_context_parallel_group())
        self.layers: list[CachedAttention] = []
        self.configs: list[Any] = []
        modules: list[Any] = list(model.modules())
        for module in modules:
            if hasattr(module, "core_attention"):
                module.core_attention = CachedAttention(module.core_attention, self.cache)
                self.layers.append(module.core_attention)
                self.configs.append(module.config)
        if any(getattr(config, "fp8", None) for config in self.configs):
            raise ConfigError(
                "--fp8-format: generation takes single tokens, which FP8 kernels do not; drop it"
            )
        (self.rope,) = [module for module in modules if hasattr(module, "get_emb")]
        tp = parallel_state.get_tensor_model_parallel_world_size()
        self.tokens_per_step = tp if options.get("sequence_parallel", True) else 1

    def generate_rows(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[np.ndarray]:
        """Give the tokens that greedy decoding adds to each prompt, without the one that ends it.

        Args:
            prompts: Token ids; with the answer, whose last token is not read, at most `context_length`.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        assert longest + max_new_tokens <= self.context_length + 1, "a prompt that leaves no room"
        padded = pad_length(longest, longest=self.context_length, step=self.length_step)
        tokens = torch.zeros(len(prompts), padded, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        if self.on_batch is not None:
            self.on_batch()
        with torch.no_grad():
            answers = self._generate(tokens, lengths, max_new_tokens)
        return [until_stop(row, self.stop_ids) for row in answers.numpy()]

    def _generate(self, tokens: Tensor, lengths: Tensor, max_new_tokens: int) -> Tensor:
        """Generate [b, up to max_new_tokens]; rows that have ended go on until all have."""
        stops = torch.tensor(sorted(self.stop_ids), dtype=torch.int64)
        device = torch.cuda.current_device()
        places = self.own_shard(torch.arange(tokens.size(1))[None].to(device))[0]
        self.cache.begin(lengths.to(device), places, max_new_tokens)
        labels = torch.full_like(tokens, UNSCORED)
        labels[torch.arange(len(tokens)), lengths - 1] = 0  # marks what is asked for
        self._check(tokens, labels)
        try:
            found = self._collect(self._forward(tokens, labels), tokens.shape)
            new = [found[0].cpu()[torch.arange(len(tokens)), lengths - 1].long()]
            ended = torch.isin(new[0], stops)
            with self._positions_given() as give:
                while len(new) < max_new_tokens and not ended.all():
                    give(lengths + len(new) - 1)
                    self.cache.take_token()
                    new.append(self._step(new[-1]))
                    ended |= torch.isin(new[-1], stops)
        finally:
            self.cache.end()
            for layer in self.layers:
                layer.drop()
        return torch.stack(new, dim=1)

    def _step(self, tokens: Tensor) -> Tensor:
        """Feed one token of each row [b]; gives the next ones [b], on the CPU of every rank."""
        device = torch.cuda.current_device()
        repeated = tokens[:, None].expand(-1, self.tokens_per_step).to(device)
        labels = torch.full_like(repeated, UNSCORED)
        labels[:, 0] = 0
        # Positions come by `_positions_given`; every context-parallel rank computes the same token.
        local = self._run(repeated, labels, torch.zeros_like(repeated))
        return self._share(local, repeated.shape)[0, :, 0].cpu().long()

    @contextmanager
    def _positions_given(self) -> Iterator[Any]:
        """Let RoPE turn the tokens of a pass by the positions that are given, a row its own."""
        table = self.rope.get_emb(self.context_length)
        angles = table[0] if isinstance(table, tuple) else table  # YaRN adds its factor
        fused = [config.apply_rope_fusion for config in self.configs]
        for config in self.configs:
            config.apply_rope_fusion = False  # the kernel takes the same positions for all rows

        def give(positions: Tensor) -> None:
            rows = angles[positions.to(angles.device), 0]  # [b, 1, d]
            turned = rows[None].expand(self.tokens_per_step, -1, -1, -1)
            answer = (turned, *table[1:]) if isinstance(table, tuple) else turned
            self.rope.forward = lambda *args, **options: answer

        try:
            yield give
        finally:
            for config, is_fused in zip(self.configs, fused, strict=True):
                config.apply_rope_fusion = is_fused
            self.rope.__dict__.pop("forward", None)

    def _measure(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard
    ) -> Tensor:
        """In a pass of a generation, the likeliest token of each position [n] twice: [2, n]."""
        if not self.cache.is_active:
            return super()._measure(hidden, weight, labels, shard)
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        return top_tokens(hidden, weight, shard, group).expand(2, -1)


def top_tokens(hidden: Tensor, weight: Tensor, shard: VocabularyShard, group: Any = None) -> Tensor:
    """Give the likeliest token of each position [n], float32 (exact up to 2^24); of equal ones the first."""
    logits = multiply(hidden, weight[: shard.num_real_rows(weight.size(0))].t())
    best = torch.full((2, len(hidden)), -torch.inf, device=hidden.device)
    if logits.size(1):
        best[0], best[1] = logits.max(dim=-1)
        best[1] += shard.first
    shards = gather_statistics(best, group)  # [tp, 2, n]
    return shards[:, 1].gather(0, shards[:, 0].argmax(dim=0, keepdim=True))[0]
