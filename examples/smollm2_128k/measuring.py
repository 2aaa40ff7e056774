"""Needle, losses, export and report, by the tools that any user has."""

from collections.abc import Sequence
from itertools import pairwise

from examples.smollm2_128k.job_runner import Job
from examples.smollm2_128k.settings import K
from examples.smollm2_128k.work import MIXTURES, Model, Work

TASKS = ("sentence", "passkey")


def before(work: Work) -> list[list[Job]]:
    """The unmodified model, and the same with only the new RoPE base."""
    base = Model("before", work.base)
    rebased = Model("new-base", work.base, argv=("--rotary-base", str(work.settings.rotary_base)))
    return [[_full_needle(work, base), *_losses(work, base), *_losses(work, rebased)]]


def after(work: Work) -> list[list[Job]]:
    """The stretched model."""
    model = Model("after", work.run("per-source"), work.settings.main_steps)
    return [[_full_needle(work, model), *_losses(work, model)]]


def history(work: Work) -> list[list[Job]]:
    """Retrieval during training: the paper's figure 3."""
    return [
        [
            _needle(work, Model(f"step-{step}", work.run("per-source"), step=step), history=True)
            for step in work.settings.history_steps
        ]
    ]


def compare(work: Work) -> list[list[Job]]:
    """The mixtures at one number of tokens: the paper's table 5 and figure 4."""
    step = work.settings.mixture_steps
    models = [Model(name, work.run(name), step) for name in MIXTURES]
    models.append(Model("per-source", work.run("per-source"), step=step))
    needles = [_needle(work, model, history=True) for model in models]
    if step in work.settings.history_steps:
        needles.pop()  # the main run was measured at this step by the phase history
    return [[*needles, *(job for model in models for job in _losses(work, model))]]


def export(work: Work) -> list[list[Job]]:
    """The stretched model for transformers, and what it reproduces there.

    In FP32, in which two implementations agree closely, up to the training length; and a few needle cells as
    the run was measured, to be seen next to its own.
    """
    hf, settings = work.folder / "hf", work.settings
    out = work.results / "export"
    model = Model("after", work.run("per-source"), settings.main_steps)
    haystack = ("--haystack", str(work.books[0]), "--num-depths", "1", "--tasks", *TASKS)
    needle = (work.python, "tools/evaluate_needle.py", *haystack, "--context-lengths")
    trained = [length for length in settings.history_lengths if length <= settings.seq_length]
    lengths = [str(length) for length in trained[-3:] or settings.history_lengths[:1]]
    loss = (
        *(work.python, "tools/evaluate_loss.py", "--text", str(work.books[0]), "--force"),
        *("--max-documents-per-source", "1", "--context-length", str(settings.seq_length)),
    )
    backend = ("--backend", "hf", "--checkpoint", str(hf))
    megatron = ("--checkpoint", str(model.folder), *model.flags)
    exact = ("--precision", "fp32")
    longest = [str(length) for length in settings.history_lengths[-3:]]
    convert = Job(
        name="export",
        command=(
            *(work.python, "tools/convert_checkpoint.py", "megatron-to-hf", "--force"),
            *("--input", str(model.folder), "--output", str(hf)),
            *("--iteration", str(settings.main_steps)),
        ),
    )
    commands = {
        "needle": (*needle, *lengths, *megatron, *exact, "--output-dir", str(out / "needle")),
        "needle-hf": (*needle, *lengths, *backend, *exact, "--output-dir", str(out / "needle-hf")),
        "needle-hf-run": (*needle, *longest, *backend, "--output-dir", str(out / "needle-hf-run")),
        "loss": (*loss, *megatron, *exact, "--output", str(out / "loss.json")),
        "loss-hf": (*loss, *backend, *exact, "--output", str(out / "loss-hf.json")),
    }
    check = (work.python, "-m", "examples.smollm2_128k.check_export", str(out))
    return [
        [convert],
        [Job(name=f"export-{name}", command=command) for name, command in commands.items()],
        [Job(name="export-check", command=check)],
    ]


def report(work: Work) -> list[list[Job]]:
    """Tables and figures of all existing results."""
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
        loss_job(
            work,
            model,
            "books",
            ("--text", *map(str, work.books)),
            length,
            buckets=(*windows, *pieces),
            more=("--max-documents-per-source", str(settings.book_rows)),
        ),
        loss_job(
            work,
            model,
            "sources",
            ("--dataset", str(work.dataset("held-out"))),
            length,
            buckets=tuple(dict.fromkeys(sources)),
        ),
    ]


def loss_job(
    work: Work,
    model: Model,
    name: str,
    data: Sequence[str],
    length: int,
    *,
    buckets: Sequence[tuple[int, int]],
    more: Sequence[str] = (),
) -> Job:
    """Loss by position of a model, as `NAME.json` and a plot in its results."""
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
