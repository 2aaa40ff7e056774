"""A grid of needles from flags to report: by the command on a checkpoint, or between steps of training.

Both ask by a `NeedleRequest`, plan by `plan_needles` and score by `run_needles`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_long.errors import ConfigError
from megatron_long.evaluation.batches import TokenScorer, plan_batches
from megatron_long.evaluation.input_checks import (
    check_context_length,
    check_output,
    open_tokenizer,
)
from megatron_long.evaluation.models import (
    HF,
    LAYOUT_FLAGS,
    MeasuredModel,
    ModelChoice,
    choose_model,
    warn_beyond_rope,
)
from megatron_long.evaluation.needle.cases import NeedleCase, build_cases
from megatron_long.evaluation.needle.haystack import read_haystack
from megatron_long.evaluation.needle.needle_report import (
    NeedleReport,
    NeedleSettings,
    spread_depths,
    spread_lengths,
    write_needle_report,
)
from megatron_long.evaluation.needle.needle_scores import (
    Deadline,
    Generator,
    NeedleResult,
    free_answers,
    score_cases,
)
from megatron_long.evaluation.needle.needle_tasks import (
    SENTENCE,
    NeedleTask,
    Task,
    choose_tasks,
    describe_task,
    read_needles,
)
from megatron_long.evaluation.progress_log import append_records, shared_log, start_log
from megatron_long.evaluation.report.plots import plot_heatmap
from megatron_long.evaluation.work import count_work
from megatron_long.flags.argv import Argv

if TYPE_CHECKING:
    from megatron_long.model.geometry import LlamaGeometry
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

CELLS, REPORT, HEATMAP = "cells.jsonl", "needle.json", "needle.png"


@dataclass(frozen=True, kw_only=True)
class NeedleRequest:
    """What is to be hidden where, as flags say it."""

    haystack: Path
    context_length: int | None
    """Longest case in tokens; None is the longest of `context_lengths`."""
    min_length: int | None
    """Shortest case in tokens; None leaves it to `spread_lengths`."""
    num_lengths: int
    context_lengths: tuple[int, ...] | None = None
    """These lengths instead of `num_lengths` spread ones."""
    num_depths: int
    num_seeds: int = 1
    tasks: tuple[str, ...] = (SENTENCE,)
    sentence: NeedleTask = field(default_factory=NeedleTask)
    needles: Path | None = None
    """JSON list of needles, instead of `sentence`."""
    prompt: str = "paper"
    training_length: int | None = None

    @classmethod
    def of_command(cls, args: argparse.Namespace) -> NeedleRequest:
        """Take the flags of `evaluate_needle.py`.

        Raises: ConfigError: a sentence without its answer.
        """
        return cls(
            haystack=args.haystack,
            context_length=args.context_length,
            min_length=args.min_length,
            num_lengths=args.num_lengths,
            context_lengths=None if args.context_lengths is None else tuple(args.context_lengths),
            num_depths=args.num_depths,
            num_seeds=args.num_seeds,
            tasks=tuple(args.tasks),
            sentence=NeedleTask(args.needle, args.question, args.answer),
            needles=args.needles,
            prompt=args.prompt,
            training_length=args.training_length,
        )

    @classmethod
    def of_training(cls, args: argparse.Namespace) -> NeedleRequest:
        """Take the flags of training: those of `EvaluationArguments` and --seq-length."""
        return cls(
            haystack=Path(args.needle_haystack),
            context_length=args.seq_length,
            min_length=args.needle_min_length,
            num_lengths=args.needle_num_lengths,
            num_depths=args.needle_num_depths,
        )

    def lengths(self) -> tuple[int, ...]:
        """Give the context lengths of the grid, in tokens.

        Raises: ConfigError: none given, or out of range.
        """
        if self.context_lengths is None:
            if self.context_length is None:
                raise ConfigError(
                    "neither --context-length nor --context-lengths is given; give one"
                )
            return spread_lengths(self.min_length, self.context_length, self.num_lengths)
        longest = max(self.context_lengths)
        if self.context_length is not None and longest > self.context_length:
            raise ConfigError(
                f"--context-lengths {longest} is above --context-length {self.context_length}; "
                "leave out one of them"
            )
        return tuple(sorted(set(self.context_lengths)))

    def longest(self) -> int:
        """Give the length that the model is opened for, in tokens."""
        return self.context_length or max(self.lengths())

    def chosen_tasks(self) -> dict[str, Task]:
        """Give what is hidden, by name.

        Raises: ConfigError: no such file of needles.
        """
        needles = {} if self.needles is None else read_needles(self.needles)
        return choose_tasks(self.tasks, self.sentence, needles)


@dataclass(frozen=True)
class NeedlePlan:
    """All that is known before a model scores."""

    settings: NeedleSettings
    context_length: int
    """Longest row of a batch, tokens."""
    tokenizer: Tokenizer
    cases: list[NeedleCase]
    done: list[NeedleResult] = field(default_factory=list)
    """Cells of an earlier run of the same command."""

    @property
    def cases_left(self) -> list[NeedleCase]:
        """What is still to be scored."""
        keys = {result.key for result in self.done}
        return [case for case in self.cases if case.key not in keys]

    def report(self, results: Sequence[NeedleResult]) -> NeedleReport:
        """Put results in the order of the grid."""
        known = {result.key: result for result in results}
        ordered = [known[case.key] for case in self.cases if case.key in known]
        return NeedleReport(self.settings, ordered)


def prepare_needles(
    args: argparse.Namespace, megatron_argv: Sequence[str]
) -> tuple[ModelChoice, NeedlePlan]:
    """Check everything that can be wrong with a command, and give what is to be measured.

    Args:
        args: Flags of `evaluate_needle.py`.
        megatron_argv: Flags for Megatron.
    Raises: ConfigError, DataError: see what is called.
    """
    is_ours = args.force or (args.output_dir / CELLS).exists()
    for name in (REPORT, HEATMAP):
        check_output(args.output_dir / name, force=is_ours, flag="--output-dir")
    request = NeedleRequest.of_command(args)
    lengths = request.lengths()
    check_context_length(request.longest(), megatron_argv)
    choice = choose_model(args, megatron_argv)
    text = read_haystack(request.haystack)
    tokenizer = open_tokenizer(args.tokenizer, choice.folder)
    model = replace(choice.measured(), weights_sha256=choice.weights_sha256())
    plan = plan_needles(request, model, text, tokenizer)
    warn_beyond_rope(choice, max(lengths))
    return choice, plan


@contextmanager
def resumed(
    plan: NeedlePlan, folder: Path, *, force: bool, reads_only: bool = False
) -> Iterator[NeedlePlan]:
    """Hold the output folder, and add the cells that an earlier run of the same command left there.

    Args:
        force: Forget them.
        reads_only: Nothing will be written: another job may work in the folder.
    Raises: ConfigError: see `shared_log`.
    """
    identity = plan.settings.identity()
    with shared_log(
        folder / CELLS, identity, NeedleResult, force=force, reads_only=reads_only
    ) as results:
        yield replace(plan, done=plan.report(results).results)


def plan_needles(
    request: NeedleRequest, model: MeasuredModel, text: str, tokenizer: Tokenizer
) -> NeedlePlan:
    """Hide the needles in the text.

    Raises: ConfigError: a case cannot be built.
    """
    lengths, depths = request.lengths(), spread_depths(request.num_depths)
    tasks = request.chosen_tasks()
    argv = Argv(model.megatron_argv)
    settings = NeedleSettings(
        model=model.path,
        backend=model.backend,
        iteration=model.iteration,
        precision=model.precision,
        haystack_sha256=sha256(text.encode()).hexdigest(),
        vocabulary_sha256=tokenizer.vocabulary_sha256,
        prompt=request.prompt,
        tasks={name: describe_task(task) for name, task in tasks.items()},
        context_lengths=lengths,
        depths=depths,
        num_seeds=request.num_seeds,
        training_length=request.training_length,
        megatron_argv=argv.without(*LAYOUT_FLAGS),
        layout_argv=argv.only(*LAYOUT_FLAGS),
        weights=model.weights,
        weights_sha256=model.weights_sha256,
    )
    cases = build_cases(
        text,
        tokenizer,
        tasks,
        lengths,
        depths,
        num_seeds=request.num_seeds,
        prompt=request.prompt,
    )
    return NeedlePlan(settings, request.longest(), tokenizer, cases)


def describe_left(plan: NeedlePlan, geometry: LlamaGeometry | None, micro_batch_size: int) -> str:
    """Say what is left to do, and how much work it is where the model's shape is known."""
    left = plan.cases_left
    text = f"{len(plan.done)} of {len(plan.cases)} cells are done"
    if geometry is None or not left:
        return text
    lengths, longest = [case.context_length for case in left], plan.context_length
    batches = plan_batches(lengths, tokens_per_batch=micro_batch_size * longest, longest=longest)
    num_scored = max(case.num_answer_tokens for case in left)
    return f"{text}; left: {count_work(geometry, batches, lengths, num_scored)}"


def run_needles(
    plan: NeedlePlan,
    scorer: TokenScorer,
    *,
    micro_batch_size: int = 1,
    folder: Path | None = None,
    deadline: Deadline | None = None,
    on_scored: Callable[[int], object] = lambda number: None,
) -> NeedleReport:
    """Score what is left; every process of the job calls this. Models of Hugging Face also write answers.

    Args:
        folder: Keeps the cells that are done, so that the same command resumes; None keeps none.
        deadline: Ends the run early.
        on_scored: Called with the number of cells that were just scored.
    Returns: The cells that are done, those of the earlier run included.
    Raises: UserError: the log cannot be written. DataError: see `score_cases`.
    """
    answer_freely = None
    if plan.settings.backend == HF:
        answer_freely = free_answers(cast(Generator, scorer), plan.tokenizer)
    done = list(plan.done)
    log = folder / CELLS if folder is not None and scorer.is_writer else None
    if log is not None:
        start_log(log, plan.settings.identity(), [asdict(result) for result in done])

    def keep(results: list[NeedleResult]) -> None:
        done.extend(results)
        if log is not None:
            append_records(log, [asdict(result) for result in results])
        on_scored(len(results))

    score_cases(
        scorer,
        plan.cases_left,
        micro_batch_size=micro_batch_size,
        on_round=keep,
        deadline=deadline,
        answer_freely=answer_freely,
    )
    return plan.report(done)


def write_needle_files(
    folder: Path, report: NeedleReport, *, title: str = "Needle in a haystack"
) -> list[Path]:
    """Write the report, the heatmap and, of several tasks, one heatmap each; gives where."""
    settings, cells = report.settings, report.results
    written = [folder / REPORT, folder / HEATMAP]
    write_needle_report(written[0], report)
    length, num_cells = settings.training_length, settings.num_cells
    plot_heatmap(written[1], cells, title=title, training_length=length, num_cells=num_cells)
    if len(settings.tasks) > 1:
        for task in dict.fromkeys(cell.task for cell in cells):
            written.append(folder / f"needle-{task}.png")
            plot_heatmap(
                written[-1],
                [cell for cell in cells if cell.task == task],
                title=f"{title}: {task}",
                training_length=length,
                num_cells=num_cells // len(settings.tasks),
            )
    return written
