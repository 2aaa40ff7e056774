"""Needle-in-a-haystack heatmap of a checkpoint: context length by depth of the needle.

The haystack is any long text file; the needle goes between two of its sentences. Each case is one
row of a forward pass: greedy decoding gives the answer exactly if every answer token is the most
likely one. Short cases share a pass. Cells that are done are kept: the same command goes on where
it was stopped. Flags that are not listed here go to Megatron, such as --context-parallel-size.

    torchrun --nproc-per-node 4 tools/evaluate_needle.py --checkpoint CKPT --haystack book.txt \\
        --context-length 131072 --training-length 81920 --output-dir needle \\
        --context-parallel-size 4
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from megatron_long.cli import length_tokens, tool_parser
from megatron_long.errors import ConfigError
from megatron_long.evaluation.batches import TokenScorer, plan_batches
from megatron_long.evaluation.input_checks import (
    check_context_length,
    check_output,
    open_tokenizer,
    positive_int,
)
from megatron_long.evaluation.models import (
    HF,
    LAYOUT_FLAGS,
    ModelChoice,
    add_model_flags,
    check_megatron_flags,
    choose_model,
    open_generator,
    open_model,
    warn_beyond_rope,
)
from megatron_long.evaluation.needle.cases import PROMPTS, NeedleCase, build_cases
from megatron_long.evaluation.needle.haystack import read_haystack
from megatron_long.evaluation.needle.needle_report import (
    NeedleReport,
    NeedleSettings,
    format_summary,
    spread_depths,
    spread_lengths,
    write_needle_report,
)
from megatron_long.evaluation.needle.needle_scores import (
    Deadline,
    NeedleResult,
    free_answers,
    score_cases,
)
from megatron_long.evaluation.needle.needle_tasks import (
    SENTENCE,
    TASK_NAMES,
    NeedleTask,
    Task,
    choose_tasks,
    describe_task,
    read_needles,
)
from megatron_long.evaluation.progress_log import append_records, shared_log, start_log, writing
from megatron_long.evaluation.work import count_work
from megatron_long.flags.argv import Argv
from megatron_long.job.rendezvous import is_first_process
from megatron_long.tokenizer.tokenizer_types import Tokenizer

CELLS, REPORT, HEATMAP = "cells.jsonl", "needle.json", "needle.png"


@dataclass(frozen=True)
class Preparation:
    """All that is known before the model is built."""

    choice: ModelChoice
    settings: NeedleSettings
    context_length: int
    tokenizer: Tokenizer
    cases: list[NeedleCase]
    done: list[NeedleResult] = field(default_factory=list)
    """Cells of an earlier run of the same command."""

    @property
    def cases_left(self) -> list[NeedleCase]:
        """What is still to be scored."""
        keys = {result.key for result in self.done}
        return [case for case in self.cases if case.key not in keys]


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's own flags."""
    parser = tool_parser(__doc__)
    add_model_flags(parser)
    _add_grid_flags(parser)
    _add_task_flags(parser)
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, help=f"folder for {CELLS}, {REPORT}, {HEATMAP}")
    add("--training-length", type=length_tokens, help="context trained at, in tokens: split there")
    add("--stop-after-minutes", type=float, help="stop in time; the same command goes on later")
    add("--dry-run", action="store_true", help="check, say how much work it is, and end")
    add("--force", action="store_true", help="forget the cells that are done")
    return parser


def _add_grid_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--haystack", type=Path, required=True, help="long text file, UTF-8")
    add(
        "--context-length",
        type=length_tokens,
        help="longest case in tokens, a multiple of 2 * --context-parallel-size where that is above 1",
    )
    add(
        "--min-length",
        type=length_tokens,
        help="shortest case in tokens (default: 1024, or an eighth of --context-length if less)",
    )
    add("--num-lengths", type=positive_int, default=40, help="lengths (default: %(default)s)")
    add("--context-lengths", type=length_tokens, nargs="+", help="these lengths in tokens instead")
    add("--num-depths", type=positive_int, default=10, help="depths from 0 to 100%% (default: 10)")
    add("--num-seeds", type=positive_int, default=1, help="repetitions of each cell (default: 1)")


def _add_task_flags(parser: argparse.ArgumentParser) -> None:
    add, task = parser.add_argument, NeedleTask()
    add(
        "--tasks",
        nargs="+",
        choices=TASK_NAMES,
        default=[SENTENCE],
        help="what to hide: the sentence of --needle, or names and numbers drawn for each case",
    )
    add("--needle", default=task.needle, help="sentence to hide (default: %(default)s)")
    add("--question", default=task.question, help="how it is asked for (default: %(default)s)")
    add("--answer", default=task.answer, help="words of the needle to give (default: %(default)s)")
    add("--needles", type=Path, help="JSON list of {needle, question, answer}, instead of one")
    add("--prompt", choices=tuple(PROMPTS), default="paper", help="(default: %(default)s)")


def choose_lengths(args: argparse.Namespace) -> tuple[int, ...]:
    """Give the context lengths of the grid, in tokens.

    Raises: ConfigError: none given, or out of range.
    """
    if args.context_lengths is None and args.context_length is None:
        raise ConfigError("neither --context-length nor --context-lengths is given; give one")
    if args.context_lengths is None:
        return spread_lengths(args.min_length, args.context_length, args.num_lengths)
    longest = max(args.context_lengths)
    if args.context_length is not None and longest > args.context_length:
        raise ConfigError(
            f"--context-lengths {longest} is above --context-length {args.context_length}; "
            "leave out one of them"
        )
    return tuple(sorted(set(args.context_lengths)))


def prepare(args: argparse.Namespace, megatron_argv: Sequence[str]) -> Preparation:
    """Check everything that can be wrong and give what is to be measured."""
    for name in (REPORT, HEATMAP):
        check_output(args.output_dir / name, force=True, flag="--output-dir")
    lengths = choose_lengths(args)
    context_length = args.context_length or max(lengths)
    check_context_length(context_length, megatron_argv)
    choice = choose_model(args, megatron_argv)
    needles = {} if args.needles is None else read_needles(args.needles)
    sentence = NeedleTask(args.needle, args.question, args.answer)
    tasks = choose_tasks(tuple(args.tasks), sentence, needles)
    text = read_haystack(args.haystack)
    tokenizer = open_tokenizer(args.tokenizer, choice.folder)
    settings = describe_settings(args, megatron_argv, choice, tasks, lengths, text, tokenizer)
    _refuse_foreign_report(args, is_ours=args.force or (args.output_dir / CELLS).exists())
    cases = build_cases(
        text,
        tokenizer,
        tasks,
        lengths,
        settings.depths,
        num_seeds=args.num_seeds,
        prompt=args.prompt,
    )
    warn_beyond_rope(choice, max(lengths), megatron_argv)
    return Preparation(choice, settings, context_length, tokenizer, cases)


def with_done(preparation: Preparation, results: Sequence[NeedleResult]) -> Preparation:
    """Add the results of an earlier run, one for each cell."""
    return replace(preparation, done=in_order(preparation.cases, results))


def describe_settings(
    args: argparse.Namespace,
    megatron_argv: Sequence[str],
    choice: ModelChoice,
    tasks: Mapping[str, Task],
    lengths: tuple[int, ...],
    text: str,
    tokenizer: Tokenizer,
) -> NeedleSettings:
    """Give what is measured, for the report and for the next run of the same command."""
    argv = Argv(megatron_argv)
    return NeedleSettings(
        model=str(choice.folder.path),
        backend=choice.backend,
        iteration=choice.folder.iteration,
        precision=args.precision,
        haystack_sha256=sha256(text.encode()).hexdigest(),
        vocabulary_sha256=tokenizer.vocabulary_sha256,
        prompt=args.prompt,
        tasks={name: describe_task(task) for name, task in tasks.items()},
        context_lengths=lengths,
        depths=spread_depths(args.num_depths),
        num_seeds=args.num_seeds,
        training_length=args.training_length,
        megatron_argv=argv.without(*LAYOUT_FLAGS),
        layout_argv=argv.only(*LAYOUT_FLAGS),
        weights=choice.measured_weights(),
        weights_sha256=choice.weights_sha256(),
    )


def _refuse_foreign_report(args: argparse.Namespace, *, is_ours: bool) -> None:
    if not is_ours:
        for name in (REPORT, HEATMAP):
            check_output(args.output_dir / name, force=False, flag="--output-dir")


def describe(preparation: Preparation, micro_batch_size: int) -> str:
    """Say what is left to do."""
    left = preparation.cases_left
    text = f"{len(preparation.done)} of {len(preparation.cases)} cells are done"
    geometry = preparation.choice.geometry()
    if geometry is None or not left:
        return text
    lengths = [case.context_length for case in left]
    longest = preparation.context_length
    batches = plan_batches(lengths, tokens_per_batch=micro_batch_size * longest, longest=longest)
    num_scored = max(case.num_answer_tokens for case in left)
    return f"{text}; left: {count_work(geometry, batches, lengths, num_scored)}"


def publish(args: argparse.Namespace, settings: NeedleSettings, cells: list[NeedleResult]) -> None:
    """Write the files and print the means.

    Raises: UserError: they cannot be written.
    """
    report = NeedleReport(settings, cells)
    with writing(args.output_dir / REPORT):
        written = write_results(args, report)
    print(format_summary(report))
    print("wrote", *written)


def write_results(args: argparse.Namespace, report: NeedleReport) -> list[Path]:
    """Write the report and the heatmaps; gives where."""
    from megatron_long.evaluation.report.plots import plot_heatmap

    settings, cells = report.settings, report.results
    write_needle_report(args.output_dir / REPORT, report)
    written = [args.output_dir / REPORT, args.output_dir / HEATMAP]
    plot_heatmap(
        written[-1],
        cells,
        training_length=settings.training_length,
        num_cells=settings.num_cells,
    )
    if len(settings.tasks) > 1:
        for task in dict.fromkeys(cell.task for cell in cells):
            written.append(args.output_dir / f"needle-{task}.png")
            part = [cell for cell in cells if cell.task == task]
            plot_heatmap(
                written[-1],
                part,
                title=f"Needle in a haystack: {task}",
                training_length=settings.training_length,
                num_cells=settings.num_cells // len(settings.tasks),
            )
    return written


def score(args: argparse.Namespace, preparation: Preparation, argv: Sequence[str]) -> int:
    """Load the model, score what is left and write; gives the number of cells that are still left."""
    from tqdm import tqdm

    scorer, answer_freely = load(args, preparation, argv)
    minutes = args.stop_after_minutes
    deadline = Deadline(None if minutes is None else 60 * minutes, PROGRAM_START)
    cells, done = args.output_dir / CELLS, list(preparation.done)
    if scorer.is_writer:
        start_log(cells, preparation.settings.identity(), [asdict(result) for result in done])
    left = preparation.cases_left
    with tqdm(
        total=len(left), unit="case", disable=not scorer.is_writer, mininterval=1
    ) as progress:

        def keep(results: list[NeedleResult]) -> None:
            done.extend(results)
            if scorer.is_writer:
                append_records(cells, [asdict(result) for result in results])
                progress.update(len(results))

        score_cases(
            scorer,
            left,
            micro_batch_size=args.micro_batch_size,
            on_round=keep,
            deadline=deadline,
            answer_freely=answer_freely,
        )
    if scorer.is_writer and done:
        publish(args, preparation.settings, in_order(preparation.cases, done))
    is_writer = scorer.is_writer
    scorer.close()
    num_left = len(preparation.cases) - len(done)
    if is_writer and num_left:
        print(f"stopped in time with {num_left} cells left; the same command goes on")
    return num_left


def load(
    args: argparse.Namespace, preparation: Preparation, argv: Sequence[str]
) -> tuple[TokenScorer, Callable[[NeedleCase, NeedleResult], NeedleResult] | None]:
    """Load the model; one of Hugging Face's also writes its answers."""
    choice, length = preparation.choice, preparation.context_length
    if choice.backend == HF:
        model = open_generator(choice, context_length=length, precision=args.precision)
        return model, free_answers(model, preparation.tokenizer)
    scorer = open_model(choice, context_length=length, megatron_argv=argv, precision=args.precision)
    return scorer, None


def in_order(cases: Sequence[NeedleCase], results: Sequence[NeedleResult]) -> list[NeedleResult]:
    """Sort results as the grid runs."""
    known = {result.key: result for result in results}
    return [known[case.key] for case in cases if case.key in known]


def main() -> None:
    """Parse, check, score, write."""
    args, megatron_argv = build_parser().parse_known_args()
    preparation = prepare(args, megatron_argv)
    cells, identity = args.output_dir / CELLS, preparation.settings.identity()
    with shared_log(
        cells, identity, NeedleResult, force=args.force, reads_only=args.dry_run
    ) as results:
        measure(args, with_done(preparation, results), megatron_argv)


def measure(args: argparse.Namespace, preparation: Preparation, megatron_argv: list[str]) -> None:
    """Do what is left, or with `--dry-run` say what it is."""
    if args.dry_run:
        check_megatron_flags(
            preparation.choice,
            context_length=preparation.context_length,
            megatron_argv=megatron_argv,
            precision=args.precision,
        )
    if is_first_process():
        print(describe(preparation, args.micro_batch_size), flush=True)
    if args.dry_run:
        return
    if preparation.cases_left:
        score(args, preparation, megatron_argv)
    elif is_first_process():
        publish(args, preparation.settings, in_order(preparation.cases, preparation.done))


PROGRAM_START = time.monotonic()
