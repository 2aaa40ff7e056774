"""RULER from flags to report: what is asked, the answers that are left, the files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_long.errors import ConfigError
from megatron_long.evaluation.batches import plan_batches
from megatron_long.evaluation.generation.sample_results import SampleResult
from megatron_long.evaluation.input_checks import check_context_length, check_output, open_tokenizer
from megatron_long.evaluation.models import (
    LAYOUT_FLAGS,
    ModelChoice,
    RowGenerator,
    choose_model,
    warn_beyond_rope,
)
from megatron_long.evaluation.needle.needle_scores import Deadline
from megatron_long.evaluation.progress_log import append_records, shared_log, start_log
from megatron_long.evaluation.ruler.drawing import Request
from megatron_long.evaluation.ruler.prompt_checks import (
    check_sample,
    choose_template,
    too_long,
    with_bos,
)
from megatron_long.evaluation.ruler.ruler_definitions import CHAT_TEMPLATES, RULER_TASKS, RulerTask
from megatron_long.evaluation.ruler.ruler_inputs import RulerInputs
from megatron_long.evaluation.ruler.ruler_report import (
    FORMAT_VERSION,
    RulerReport,
    make_report,
    write_ruler_report,
)
from megatron_long.evaluation.ruler.ruler_samples import Sample, make_samples
from megatron_long.flags.argv import Argv

if TYPE_CHECKING:
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

SAMPLES, REPORT = "samples.jsonl", "ruler.json"
CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class RulerPlan:
    """All that is known before the model is loaded."""

    tokenizer: Tokenizer
    inputs: RulerInputs
    requests: list[Request]
    """Longest first: what does not fit into memory fails in the first minute."""
    num_samples: int
    """Of each request."""
    context_length: int
    settings: dict[str, Any]
    """What decides the rows, for the report and for the next run of the same command."""
    done: list[SampleResult] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        """Samples still to be answered."""
        return self.num_samples * len(self.requests) - len(self.done)

    def samples(self, request: Request, number: int | None = None) -> Iterator[Sample]:
        """Make the samples of a request."""
        is_base = request.chat_template == CHAT_TEMPLATES["base"]
        encode = self.tokenizer.encode if is_base else self.tokenizer.encode_prompt
        return make_samples(request, self.inputs, encode, number or self.num_samples)


def prepare_ruler(
    args: argparse.Namespace, megatron_argv: Sequence[str]
) -> tuple[ModelChoice, RulerPlan]:
    """Check everything that can be wrong with a command, and give what is to be asked.

    Args:
        args: Flags of `evaluate_ruler.py`.
        megatron_argv: Flags for Megatron.
    Raises: ConfigError, DataError: see what is called.
    """
    is_ours = args.force or (args.output_dir / SAMPLES).exists()
    check_output(args.output_dir / REPORT, force=is_ours, flag="--output-dir")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed {args.seed} is not from 0 to {2**32 - 1}, as RULER's must be")
    lengths, tasks = sorted(set(args.context_lengths)), list(dict.fromkeys(args.tasks))
    check_context_length(lengths[-1], megatron_argv)
    choice = choose_model(args, megatron_argv)
    tokenizer = open_tokenizer(args.tokenizer, choice.folder)
    template = choose_template(args.template, tokenizer, args.tokenizer or choice.folder.tokenizer)
    inputs = RulerInputs(args.haystack, args.squad, args.hotpotqa, args.english_words)
    inputs.check([RULER_TASKS[name] for name in tasks])
    requests = [
        Request(
            name,
            task,
            length,
            max(task.shared.tokens_to_generate, args.tokens_to_generate or 0),
            template,
            args.seed,
        )
        for length in reversed(lengths)
        for name, task in ((name, RULER_TASKS[name]) for name in tasks)
    ]
    model, argv = choice.measured(), Argv(tuple(megatron_argv))
    settings = {
        "format_version": FORMAT_VERSION,
        "model": model.path,
        "iteration": model.iteration,
        "backend": model.backend,
        "precision": model.precision,
        "megatron_argv": list(argv.without(*LAYOUT_FLAGS)),
        "weights_sha256": choice.weights_sha256(),
        "vocabulary_sha256": tokenizer.vocabulary_sha256,
        "tasks": tasks,
        "context_lengths": lengths,
        "num_samples": args.num_samples,
        "seed": args.seed,
        "template": args.template,
        "template_text": template,
        "tokens_to_generate": args.tokens_to_generate,
        "inputs": inputs.fingerprint([RULER_TASKS[name] for name in tasks]),
    }
    plan = RulerPlan(tokenizer, inputs, requests, args.num_samples, lengths[-1], settings)
    _check_samples(plan, lengths)
    warn_beyond_rope(choice, lengths[-1])
    return choice, plan


def _check_samples(plan: RulerPlan, lengths: Sequence[int]) -> None:
    """Make a sample of each task at the shortest length, and the longest where it may want more words."""
    for request in plan.requests:
        is_longest = request.context_length == lengths[-1] and request.task.kind == "cwe"
        if request.context_length == lengths[0] or is_longest:
            check_sample(next(plan.samples(request, 1)), request, plan.tokenizer)
        if "dataset" in request.task.options:
            known = plan.inputs.questions(request.task.options["dataset"]).questions
            if len(known) < plan.num_samples:
                raise ConfigError(
                    f"--num-samples {plan.num_samples} is above the {len(known)} questions for "
                    f"{request.name}; give fewer"
                )


@contextmanager
def resumed(
    plan: RulerPlan, folder: Path, *, force: bool, reads_only: bool = False
) -> Iterator[RulerPlan]:
    """Hold the output folder, and add the rows that an earlier run of the same command left there.

    Args:
        force: Forget them.
        reads_only: Nothing will be written: another job may work in the folder.
    Raises: ConfigError: see `shared_log`.
    """
    log = folder / SAMPLES
    with shared_log(log, plan.settings, SampleResult, force=force, reads_only=reads_only) as rows:
        yield replace(plan, done=list({row.key: row for row in rows}.values()))


def answer_samples(
    plan: RulerPlan,
    model: RowGenerator,
    log: Path,
    *,
    micro_batch_size: int,
    deadline: Deadline,
    on_answered: Callable[[int], object],
) -> list[SampleResult]:
    """Answer what is left; every process of the job calls this, and replicas share the batches.

    Args:
        log: File of the rows, from which the same command resumes.
        micro_batch_size: Prompts of the longest length that share a batch; of shorter ones there are more.
        on_answered: Told the number of new rows.
    Returns: All rows, those of the earlier run included.
    Raises: UserError: the log cannot be written. ConfigError: a sample cannot be made.
    """
    done, known = list(plan.done), {row.key for row in plan.done}
    if model.is_writer:
        start_log(log, plan.settings, [asdict(row) for row in done])

    def keep(rows: list[SampleResult]) -> None:
        done.extend(rows)
        if model.is_writer:
            append_records(log, [asdict(row) for row in rows])
        on_answered(len(rows))

    for request in plan.requests:
        numbers = range(plan.num_samples)
        if all((request.name, request.context_length, number) in known for number in numbers):
            continue
        if not deadline.may_go_on(model):
            break
        left = [
            sample
            for sample in plan.samples(request)
            if (request.name, request.context_length, sample.index) not in known
        ]
        tokens_per_batch = micro_batch_size * plan.context_length
        if not _answer(request, left, plan.tokenizer, model, tokens_per_batch, deadline, keep):
            break
    return done


def _answer(
    request: Request,
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    model: RowGenerator,
    tokens_per_batch: int,
    deadline: Deadline,
    keep: Callable[[list[SampleResult]], None],
) -> bool:
    """Answer samples of one task and length, a batch a replica at a time; gives whether there was time."""
    rows = [(sample, with_bos(sample.tokens, tokenizer)) for sample in samples]
    problems = [
        too_long(sample, request.task, tokenizer, request.tokens_to_generate) for sample in samples
    ]
    keep(
        [
            _result(request, sample, len(tokens), "", problem)
            for (sample, tokens), problem in zip(rows, problems, strict=True)
            if problem
        ]
    )
    asked = [row for row, problem in zip(rows, problems, strict=True) if not problem]
    batches = plan_batches(
        [len(tokens) + request.tokens_to_generate for _, tokens in asked],
        tokens_per_batch=tokens_per_batch,
        longest=model.context_length,
        step=model.length_step,
    )
    for start in range(0, len(batches), model.data_parallel_size):
        if start and not deadline.may_go_on(model):
            return False
        mine = batches[start:][model.data_parallel_rank : model.data_parallel_rank + 1]
        fresh = []
        for batch in mine:
            chosen = [asked[row] for row in batch.rows]
            said = model.generate_rows([tokens for _, tokens in chosen], request.tokens_to_generate)
            fresh += [
                _result(request, sample, len(tokens), tokenizer.decode(ids), "")
                for (sample, tokens), ids in zip(chosen, said, strict=True)
            ]
        keep([row for part in model.gather(fresh) for row in part])
    return True


def _result(
    request: Request, sample: Sample, num_tokens: int, said: str, problem: str
) -> SampleResult:
    prediction = CONTROL.sub("\n", said.strip()).strip()
    return SampleResult(
        task=request.name,
        context_length=request.context_length,
        index=sample.index,
        prompt_sha256=sha256(sample.prompt.encode("utf-8", "surrogatepass")).hexdigest(),
        prompt_tokens=num_tokens,
        answers=list(sample.answers),
        prediction=prediction,
        score=None if problem else score_answer(prediction, sample.answers, request.task),
        problem=problem,
    )


def score_answer(prediction: str, answers: Sequence[str], task: RulerTask) -> float:
    """Give RULER's score in percent: the share of the answers that the prediction holds, whatever their case.

    >>> score_answer("It is 17 and 4.", ["17", "5"], RULER_TASKS["niah_multivalue"])
    50.0
    >>> score_answer("In paris", ["Paris", "France"], RULER_TASKS["qa_1"])
    100.0
    """
    found = [answer.lower() in prediction.lower() for answer in answers]
    return 100.0 * float(np.mean(found) if task.shared.needs_all else max(found))


def write_report(folder: Path, plan: RulerPlan, rows: Sequence[SampleResult]) -> RulerReport:
    """Write the report of all rows."""
    report = make_report(plan.settings, rows)
    write_ruler_report(folder / REPORT, report)
    return report
