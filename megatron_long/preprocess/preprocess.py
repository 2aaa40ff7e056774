"""From a corpus to a dataset folder: tokenize each file, plan the mixture, write the parts, join them.

Each step leaves its result in a work folder next to the dataset, whole or not at all, so a run that is killed
resumes where it was. What is taken and in which order follows from keys made of (seed, file name, line): the
bytes are the same for any number of workers and any executor.
"""

import dataclasses
import itertools
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_long.corpus.corpus_sample import sample_texts
from megatron_long.corpus.inputs import is_url
from megatron_long.corpus.listing import (
    OnListing,
    describe_skipped,
    find_inputs,
    no_listing,
)
from megatron_long.dataset.manifest import (
    TOKENIZER_FOLDER,
    InputInfo,
    Manifest,
    SplitInfo,
    hash_tokenizer_files,
    tokenizer_info,
    write_manifest,
)
from megatron_long.dataset.report_page import REPORT_FOLDER, write_report
from megatron_long.errors import UserError
from megatron_long.files import remove_folder
from megatron_long.mixture.corpus_stats import read_info
from megatron_long.mixture.mixture import Mixture
from megatron_long.mixture.plan import Plan, TooTight, make_plan
from megatron_long.mixture.rows import read_strata
from megatron_long.mixture.supply import TooLittle
from megatron_long.preprocess.assemble import write_train, write_valid
from megatron_long.preprocess.executors import (
    ExecutorOptions,
    end_earlier_tasks,
    run_stage,
    runs_here,
)
from megatron_long.preprocess.file_pieces import split_inputs
from megatron_long.preprocess.monitor import (
    Monitor,
    OnProgress,
    TokenizeLook,
    count_done,
    no_progress,
)
from megatron_long.preprocess.preprocess_config import (
    PreprocessConfig,
    check_folders,
    tokenize_job,
    tokenize_options,
    work_folder,
)
from megatron_long.preprocess.publish import check_url, disk_errors, interrupts, publish
from megatron_long.preprocess.stages import (
    TokenizeJob,
    TokenizeStage,
    WriteJob,
    WriteStage,
    forget_tokenizers,
    item_folder,
    keep_tokenizer,
    split_parts,
)
from megatron_long.preprocess.survey import check_budget, set_limits
from megatron_long.preprocess.workdir import (
    check_unchanged,
    only_run,
    open_work,
    read_limits,
    write_limits,
    write_pickle,
)
from megatron_long.tokenizer.engines import check_sample
from megatron_long.tokenizer.loading import load_tokenizer, separate_documents
from megatron_long.tokenizer.tokenizer_files import copy_tokenizer, explain_no_bos
from megatron_long.tokenizer.tokenizer_types import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanRequest:
    """What is tokenized, and planned of it."""

    job: TokenizeJob
    mixture: Mixture
    keep_work: bool
    """Keep what was tokenized also if no plan can be made of it."""


@dataclass(frozen=True)
class Written:
    """A dataset folder that lacks its manifest."""

    folder: Path
    dtype: np.dtype
    train: SplitInfo
    valid: dict[str, SplitInfo]
    inputs: list[InputInfo]


def preprocess(
    config: PreprocessConfig,
    output: Path | str,
    on_progress: OnProgress = no_progress,
    on_listing: OnListing = no_listing,
) -> Manifest:
    """Make a dataset folder; it appears whole or not at all.

    Args:
        output: A folder, or a URL to copy the finished dataset to (then `work_dir` must be given).
        on_listing: Gets the files that will be read, and the others, before any is opened.
    """
    work = work_folder(config.work_dir, output)
    check_folders(config.inputs, output, work)
    if is_url(output):
        check_url(str(output), work, force=config.force)
    listing, executor = config.list_inputs(), config.executor
    on_listing(listing)
    files = listing.files
    tokenizer = load_tokenizer(config.tokenizer, config.engine)
    tokenizer = check_sample(tokenizer, sample_texts(files, config.keys))
    separate_documents(tokenizer, config.tokenizer, config.document_separator)
    marked = tokenizer.bos_id is not None or config.document_separator
    if not marked and (notice := explain_no_bos(config.tokenizer)):
        logger.warning("--tokenizer %s: %s", config.tokenizer, notice)
    keep_tokenizer(config.tokenizer, tokenizer)
    options = tokenize_options(config, tokenizer)
    check_budget(files, options, config.mixture)
    with disk_errors(work), only_run(work), interrupts():
        end_earlier_tasks(work)
        open_work(work, config.command(), files, force=config.force)
        with Monitor("prepare", on_progress):
            items = split_inputs(files, work, executor)
            set_limits(work, items, tokenizer, options, config.mixture)
        if not runs_here(executor, len(items)):
            forget_tokenizers()
        job = tokenize_job(items, config.tokenizer, tokenizer.engine_name, options)
        request = PlanRequest(job, config.mixture, config.keep_work)
        plan, tokens = _tokenize_and_plan(request, work, executor, on_progress)
        write = WriteJob(
            work / "plan" / "order.rows",
            split_parts(plan.order),
            tokens,
            options.dtype,
            tokenizer.bos_id,
            tokenizer.eod_id,
        )
        with Monitor("write", on_progress, count_done(WriteStage(work), len(write.parts))):
            _write(write, work, executor)
        with Monitor("finish", on_progress):
            written = _join(write, plan, [item.name for item in items], work)
            copy_tokenizer(config.tokenizer, written.folder / TOKENIZER_FOLDER)
            lost = describe_skipped(listing.lost)
            manifest = _manifest(config, tokenizer, plan, written, [*plan.warnings, *lost])
            write_manifest(written.folder, manifest)
            name = str(output) if is_url(output) else os.path.abspath(output)
            name = os.path.basename(name.rstrip("/"))
            write_report(written.folder / REPORT_FOLDER, manifest, name)
            # What has come since, such as an unfinished download, does not matter.
            check_unchanged(work, files, find_inputs(config.inputs, skip_unread=True))
            publish(written.folder, output, work, force=config.force)
        if not config.keep_work:
            remove_folder(work)
    return manifest


def _tokenize_and_plan(
    request: PlanRequest, work: Path, executor: ExecutorOptions, on_progress: OnProgress
) -> tuple[Plan, Path]:
    """Tokenize what the plan may need; once more with wider limits if it needs more.

    Returns: The plan, and the folder of the tokens.
    """
    job, scratch = request.job, work / "plan"
    while True:
        number, admission = read_limits(work)
        stage, count = TokenizeStage(work, number), len(job.files)
        options = dataclasses.replace(job.options, admission=admission)
        write_pickle(stage.job_path, dataclasses.replace(job, options=options))
        with Monitor(stage.name, on_progress, TokenizeLook(work, stage.name, job.files)):
            run_stage(stage, count, executor)
        forget_tokenizers()
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        folders = [stage.folder(index) for index in range(count)]
        try:
            with Monitor("plan", on_progress):
                plan = make_plan(folders, request.mixture, admission, options.overhead, scratch)
            return plan, work / stage.name
        except TooLittle as error:
            raise TooLittle(*error.counts, kept=work) from None
        except UserError:
            # The same command would end here again: nothing to resume.
            if not request.keep_work:
                remove_folder(work)
            raise
        except TooTight as tight:
            write_limits(work, number + 1, admission.widened(tight.wider))
            remove_folder(work / stage.name)


def _write(job: WriteJob, work: Path, executor: ExecutorOptions) -> None:
    """Write the parts of the training tokens."""
    stage = WriteStage(work)
    # The plan is made anew after a kill, and is the same: parts that are written stay valid.
    write_pickle(stage.job_path, job)
    run_stage(stage, len(job.parts), executor)


def _join(job: WriteJob, plan: Plan, names: Sequence[str], work: Path) -> Written:
    """Put the dataset folder together.

    Args:
        names: The file that each item of the first stage is, or is a piece of.
    """
    stage = WriteStage(work)
    parts = [stage.path(index) for index in range(len(job.parts))]
    folder = work / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    # Pieces of a file follow one another.
    numbers = np.cumsum([a != b for a, b in itertools.pairwise([names[0], *names])])
    valid = write_valid(folder, job, plan.valid, numbers)
    train = write_train(folder, parts, job.dtype, plan.order, numbers)
    infos = (read_info(item_folder(job.tokens, index)) for index in range(len(names)))
    return Written(folder, job.dtype, train, valid, _input_infos(infos))


def _manifest(
    config: PreprocessConfig,
    tokenizer: Tokenizer,
    plan: Plan,
    written: Written,
    warnings: list[str],
) -> Manifest:
    return Manifest(
        seed=config.seed,
        mixture=config.mixture.to_json(),
        tokenizer=tokenizer_info(tokenizer),
        dtype=written.dtype.name,
        train=written.train,
        valid=written.valid,
        sources=plan.sources,
        inputs=written.inputs,
        order=plan.evenness,
        documents_empty=plan.stats.documents_empty,
        documents_bad=plan.stats.documents_bad,
        bad_documents=plan.stats.bad,
        warnings=warnings,
        made_by=_made_by(tokenizer, plan.stats.documents_by_reference),
        tokenizer_files=hash_tokenizer_files(written.folder),
    )


def _made_by(tokenizer: Tokenizer, documents_by_reference: int) -> dict[str, str]:
    made_by = {"engine": tokenizer.engine_name, "engine_version": tokenizer.engine_version}
    notes = list(tokenizer.engine_notes)
    if documents_by_reference:
        notes.append(
            f"{documents_by_reference:,} documents were tokenized by the reference: they contain characters "
            f"that {tokenizer.engine_name} classifies differently"
        )
    return made_by | ({"engine_notes": "; ".join(notes)} if notes else {})


def _input_infos(infos: Iterable[dict[str, Any]]) -> list[InputInfo]:
    """Put the pieces of each file together."""
    files = []
    for _, pieces in itertools.groupby(infos, lambda info: info["name"]):
        documents = bad = 0
        for info in pieces:
            documents += round(sum(counts.documents for _, counts in read_strata(info)))
            bad += info["documents_bad"]
        files.append(InputInfo(info["name"], info["size_bytes"], documents, info["xxh3_128"], bad))
    return files
