"""Training and validation datasets for Megatron's loop: ours in file order, or Megatron's own."""

import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.datasets.utils import Split

from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.dataset.manifest import read_manifest
from megatron_long.dataset.packed_dataset import PackedDataset
from megatron_long.errors import ConfigError
from megatron_long.flags.arguments import LongContextArguments
from megatron_long.job.rendezvous import is_first_process
from megatron_long.training.window_order import BalancedWindows

_log = logging.getLogger(__name__)

GROWING = ("rampup_batch_size", "step_batch_size_schedule")
"""Flags under which steps differ in size."""
NumSamples = tuple[int, int | None, int]
"""Samples that Megatron requests from the training, validation and test sets; None is one whole pass."""


class RoundRobinDataset(torch.utils.data.Dataset):
    """Windows of several datasets in turn, each read again from its start when it ends."""

    split = Split.valid  # Megatron's loader uses the evaluation batch size for it

    def __init__(self, datasets: list[PackedDataset], num_samples: int | None) -> None:
        self.datasets = datasets
        self.num_samples = sum(map(len, datasets)) if num_samples is None else num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        turn, which = divmod(int(index), len(self.datasets))
        dataset = self.datasets[which]
        return dataset[turn % len(dataset)]


def dataset_provider(arguments: LongContextArguments, args: Namespace) -> Callable:
    """The function that Megatron's loop calls for its datasets (stage by stage, on each rank).

    Args:
        arguments: The project's flags: with `dataset`, windows in file order; without, Megatron's own
            `GPTDataset` over `--data-path`.
        args: Megatron's validated flags.
    """

    def provide(num_samples: NumSamples, vp_stage: int | None = None) -> tuple:
        if arguments.dataset:
            if not (_is_reader() if arguments.document_masking else _reads_data()):
                return None, None, None
            return _mixed_datasets(Path(arguments.dataset), arguments, args, num_samples)
        return _stock_datasets(args, num_samples)

    provide.is_distributed = True  # type: ignore[attr-defined]  # each rank decides for itself
    return provide


def _reads_data() -> bool:
    is_edge = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    return is_edge and _is_reader()


def _is_reader() -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0


def _mixed_datasets(
    folder: Path, arguments: LongContextArguments, args: Namespace, num_samples: NumSamples
) -> tuple:
    train_samples, valid_samples, _ = num_samples
    eod_id = read_manifest(folder).tokenizer.eod_id if args.eod_mask_loss else None
    windows = PackedDataset(
        folder / "train",
        args.seq_length,
        num_samples=train_samples,
        eod_id=eod_id,
        mask_documents=arguments.document_masking,
        allow_repeat=arguments.allow_repeat,
    )
    train = _balanced(windows, arguments, args)
    valid = None
    if args.eval_iters or args.full_validation:
        valid = validation_dataset(
            folder,
            args.seq_length,
            eod_id,
            valid_samples,
            mask_documents=arguments.document_masking,
        )
    return train, valid, None


def _balanced(
    windows: PackedDataset, arguments: LongContextArguments, args: Namespace
) -> PackedDataset | BalancedWindows:
    """Deal the windows of each step evenly, where replicas would wait for each other's attention."""
    replicas = args.data_parallel_size
    uneven = arguments.document_masking and replicas > 1 and not arguments.keep_window_order
    grows = any(getattr(args, name, None) for name in GROWING)
    if not uneven or args.micro_batch_size > 1 or grows:
        return windows
    dealt = BalancedWindows(windows, args.global_batch_size, replicas, args.consumed_train_samples)
    if is_first_process():
        before, after = dealt.slowest_replica()
        _log.warning(
            "windows are dealt to %d replicas by attention work: the one with the most has %.2f times the "
            "mean of its step (%.2f in file order, --keep-window-order)",
            replicas,
            after,
            before,
        )
    return dealt


def validation_dataset(
    folder: Path,
    seq_length: int,
    eod_id: int | None,
    num_samples: int | None,
    *,
    mask_documents: bool = False,
) -> RoundRobinDataset:
    """Windows of the held-out documents of every source in turn.

    Raises: ConfigError: no source holds one window.
    """
    valid = read_manifest(folder).valid
    prefixes = [folder / valid[source].prefix for source in sorted(valid)]
    datasets = [
        PackedDataset(prefix, seq_length, eod_id=eod_id, mask_documents=mask_documents)
        for prefix in prefixes
        if IndexedDatasetReader(prefix).num_tokens > seq_length
    ]
    if not datasets:
        raise ConfigError(
            f"no source of {folder}/valid holds a window of --seq-length {seq_length} tokens; prepare "
            "the dataset with a larger --valid-tokens-per-source, or give --eval-iters 0"
        )
    return RoundRobinDataset(datasets, num_samples)


def _stock_datasets(args: Namespace, num_samples: NumSamples) -> tuple:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    from megatron_long.engine.megatron_adapter import stock_blend

    blend, blend_per_split = stock_blend(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, _reads_data, config).build()
