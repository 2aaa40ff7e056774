"""From a corpus to a dataset folder: tokenize each file, plan the mixture, write the parts, join them.

Each step leaves its result in a work folder next to the dataset, whole or not at all, so a run that is killed
goes on where it was. What is taken and in which order follows from keys made of (seed, file name, line): the
bytes are the same for any number of workers and any executor.
"""

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_long.corpus.corpus_sample import sample_texts
from megatron_long.corpus.inputs import InputFile, find_inputs, is_url
from megatron_long.dataset.manifest import (
    TOKENIZER_FOLDER,
    InputInfo,
    Manifest,
    hash_tokenizer_files,
    tokenizer_info,
    write_manifest,
)
from megatron_long.dataset.report_page import REPORT_FOLDER, write_report
from megatron_long.errors import UserError
from megatron_long.files import remove_folder
from megatron_long.mixture.admission import Admission
from megatron_long.mixture.corpus_stats import read_info
from megatron_long.mixture.plan import Plan, TooTight, make_plan
from megatron_long.mixture.rows import read_strata
from megatron_long.preprocess.assemble import write_train, write_valid
from megatron_long.preprocess.executors import run_stage
from megatron_long.preprocess.file_pieces import split_inputs
from megatron_long.preprocess.monitor import Monitor, OnProgress, no_progress
from megatron_long.preprocess.preprocess_config import (
    PreprocessConfig,
    choose_dtype,
    overhead_tokens,
    tokenize_options,
    work_folder,
)
from megatron_long.preprocess.publish import disk_errors, publish
from megatron_long.preprocess.stages import (
    TokenizeJob,
    TokenizeStage,
    WriteJob,
    WriteStage,
    forget_tokenizers,
    split_parts,
)
from megatron_long.preprocess.survey import (
    SURVEY_FROM_BYTES,
    admit,
    everything,
    expected_tokens,
    survey_corpus,
)
from megatron_long.preprocess.tokenize_file import TokenizeOptions
from megatron_long.preprocess.workdir import (
    check_unchanged,
    only_run,
    open_work,
    write_json,
    write_pickle,
)
from megatron_long.tokenizer.engines import check_sample, release_engine
from megatron_long.tokenizer.loading import load_tokenizer
from megatron_long.tokenizer.tokenizer_files import copy_tokenizer
from megatron_long.tokenizer.tokenizer_types import Tokenizer

EXPECTED_FILE = "expected.json"


def preprocess(
    config: PreprocessConfig, output: Path | str, on_progress: OnProgress = no_progress
) -> Manifest:
    """Make a dataset folder; it appears whole or not at all.

    Args:
        output: A folder, or a URL to copy the finished dataset to (then `work_dir` must be given).
    """
    files = find_inputs(config.inputs)
    tokenizer = load_tokenizer(config.tokenizer, config.engine)
    tokenizer = check_sample(tokenizer, sample_texts(files, config.keys))
    work = work_folder(config, output)
    with disk_errors(work), only_run(work):
        open_work(work, config.command(), files, force=config.force)
        items = split_inputs(files, work, config.executor)
        with Monitor(work, items, on_progress) as monitor:
            plan, stage = _tokenize_and_plan(config, items, tokenizer, work, monitor)
            monitor.set_stage("write")
            folder = _write(config, items, tokenizer, work, plan, stage)
            check_unchanged(work, files, find_inputs(config.inputs))
        manifest = folder.manifest
        publish(folder.path, output)
        if not config.keep_work:
            remove_folder(work)
    return manifest


def _tokenize_and_plan(
    config: PreprocessConfig,
    files: list[InputFile],
    tokenizer: Tokenizer,
    work: Path,
    monitor: Monitor,
) -> tuple[Plan, TokenizeStage]:
    """Tokenize what the plan may need; once more with wider limits if it needs more."""
    number = max((int(path.suffix[1:]) for path in work.glob("admission.*")), default=0)
    while True:
        stage = TokenizeStage(work, number)
        admission = _admission(config, files, tokenizer, work, number)
        options = tokenize_options(config, tokenizer, admission)
        write_pickle(stage.job_path, _tokenize_job(config, files, tokenizer, options))
        if (work / EXPECTED_FILE).exists():
            monitor.expected = orjson.loads((work / EXPECTED_FILE).read_bytes())
        monitor.set_stage(stage.name)
        run_stage(stage, len(files), config.executor)
        forget_tokenizers()
        monitor.set_stage("plan")
        scratch = work / "plan"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        folders = [stage.folder(index) for index in range(len(files))]
        try:
            overhead = overhead_tokens(tokenizer)
            return make_plan(folders, config.mixture, admission, overhead, scratch), stage
        except UserError:
            # The same command would end here again: nothing to go on with.
            if not config.keep_work:
                remove_folder(work)
            raise
        except TooTight as tight:
            number += 1
            write_json(work / f"admission.{number}", admission.widened(tight.wider).to_json())
            remove_folder(work / stage.name)


def _tokenize_job(
    config: PreprocessConfig,
    files: list[InputFile],
    tokenizer: Tokenizer,
    options: TokenizeOptions,
) -> TokenizeJob:
    """Say what the tasks need to know; with absolute paths, for they may start in another folder."""
    found = [
        file if is_url(file.path) else dataclasses.replace(file, path=os.path.abspath(file.path))
        for file in files
    ]
    return TokenizeJob(found, config.tokenizer.absolute(), tokenizer.engine_name, options)


def _admission(
    config: PreprocessConfig,
    files: list[InputFile],
    tokenizer: Tokenizer,
    work: Path,
    number: int,
) -> Admission:
    """Read the limits of a round; set those of the first one by a survey if the corpus is large."""
    path = work / f"admission.{number}"
    if path.exists():
        return Admission.from_json(orjson.loads(path.read_bytes()))
    admission = everything(config.mixture)
    if sum(file.size_bytes for file in files) > SURVEY_FROM_BYTES:
        folder = work / "survey"
        shutil.rmtree(folder, ignore_errors=True)
        options = dataclasses.replace(tokenize_options(config, tokenizer, admission), skip_bad=True)
        survey = survey_corpus(files, tokenizer, options, folder)
        release_engine(tokenizer)
        admission = admit(survey, config.mixture)
        shutil.rmtree(folder)
        write_json(work / EXPECTED_FILE, expected_tokens(survey, admission))
    write_json(path, admission.to_json())
    return admission


@dataclass(frozen=True)
class _Made:
    path: Path
    manifest: Manifest


def _write(
    config: PreprocessConfig,
    files: list[InputFile],
    tokenizer: Tokenizer,
    work: Path,
    plan: Plan,
    stage: TokenizeStage,
) -> _Made:
    writing = WriteStage(work)
    # The plan is made anew after a kill, and is the same: parts that are written stay valid.
    job = WriteJob(
        work / "plan" / "order.rows",
        split_parts(plan.order),
        work / stage.name,
        choose_dtype(config, tokenizer),
        tokenizer.bos_id,
        tokenizer.eod_id,
    )
    write_pickle(writing.job_path, job)
    run_stage(writing, len(job.parts), config.executor)
    folder = work / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = [item.name for item in files]  # pieces of a file follow one another
    numbers = np.cumsum([a != b for a, b in itertools.pairwise([names[0], *names])])
    valid = write_valid(folder, job, plan.valid, numbers)
    train = write_train(folder, writing, job, plan.order, numbers)
    copy_tokenizer(config.tokenizer, folder / TOKENIZER_FOLDER)
    infos = (read_info(stage.folder(index)) for index in range(len(files)))
    manifest = Manifest(
        seed=config.seed,
        mixture=dataclasses.asdict(config.mixture),
        tokenizer=tokenizer_info(tokenizer),
        dtype=job.dtype.name,
        train=train,
        valid=valid,
        sources=plan.sources,
        inputs=_input_infos(infos),
        order=plan.evenness,
        documents_empty=plan.stats.documents_empty,
        documents_bad=plan.stats.documents_bad,
        bad_documents=plan.stats.bad,
        warnings=plan.warnings,
        made_by=_made_by(tokenizer),
        tokenizer_files=hash_tokenizer_files(folder),
    )
    write_manifest(folder, manifest)
    write_report(folder / REPORT_FOLDER, manifest)
    return _Made(folder, manifest)


def _made_by(tokenizer: Tokenizer) -> dict[str, str]:
    made_by = {"engine": tokenizer.engine_name, "engine_version": tokenizer.engine_version}
    notes = {"engine_notes": "; ".join(tokenizer.engine_notes)} if tokenizer.engine_notes else {}
    return made_by | notes


def _input_infos(infos: Iterable[dict[str, Any]]) -> list[InputInfo]:
    """Put the pieces of each file together."""
    files = []
    for _, pieces in itertools.groupby(infos, lambda info: info["name"]):
        documents = bad = 0
        for info in pieces:
            documents += sum(counts.documents for _, counts in read_strata(info))
            bad += info["documents_bad"]
        files.append(InputInfo(info["name"], info["size_bytes"], documents, info["xxh3_128"], bad))
    return files
