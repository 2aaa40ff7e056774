"""From a corpus to a dataset folder: tokenize each file, plan the mixture, write the parts, join them.

Each step leaves its result in a work folder beside the dataset, whole or not at all, so a run that is killed
goes on where it was. What is taken and in which order follows from keys made of (seed, file name, line): the
bytes are the same for any number of workers and any executor.
"""

import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_long.data.admission import Admission
from megatron_long.data.assemble import write_train, write_valid
from megatron_long.data.corpus_sample import sample_texts
from megatron_long.data.corpus_stats import read_info
from megatron_long.data.documents import RecordKeys
from megatron_long.data.engines import check_sample
from megatron_long.data.executors import ExecutorOptions, run_stage
from megatron_long.data.indexed import token_dtype
from megatron_long.data.inputs import InputFile, file_system, find_inputs, is_url
from megatron_long.data.length_bound import extra_tokens_bound
from megatron_long.data.manifest import (
    TOKENIZER_FOLDER,
    InputInfo,
    Manifest,
    OrderInfo,
    SourceInfo,
    tokenizer_info,
    write_manifest,
)
from megatron_long.data.mixture import Mixture, named_sources
from megatron_long.data.monitor import Monitor, OnProgress, no_progress
from megatron_long.data.plan import Plan, TooTight, make_plan
from megatron_long.data.report_page import REPORT_FOLDER, write_report
from megatron_long.data.scaling import scale_source
from megatron_long.data.stages import TokenizeJob, TokenizeStage, WriteJob, WriteStage, split_parts
from megatron_long.data.survey import (
    SURVEY_FROM_BYTES,
    admit,
    everything,
    expected_tokens,
    survey_corpus,
)
from megatron_long.data.tokenize_file import TokenizeOptions
from megatron_long.data.tokenizers import Tokenizer, copy_tokenizer, load_tokenizer
from megatron_long.data.workdir import (
    check_unchanged,
    hash_tokenizer,
    only_run,
    open_work,
    write_json,
    write_pickle,
)
from megatron_long.errors import ConfigError, DataError, UserError
from megatron_long.files import atomic_path, move_into_place

DRY_RUN_TEXT_BYTES = 64 << 20
WORK_SUFFIX = ".work"
WORK_VERSION = 1
"""Changes with what lies in the work folder, and with what is chosen."""
EXPECTED_FILE = "expected.json"


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to read and how to mix it."""

    inputs: Sequence[Path | str]
    """Files, folders or URLs."""
    tokenizer: Path
    mixture: Mixture
    seed: int = 0
    keys: RecordKeys = field(default_factory=RecordKeys)
    workers: int = 1
    engine: str = "auto"
    on_bad_document: str = "stop"
    """`stop`, or `skip` to leave out documents that cannot be read and list them."""
    token_dtype: str = "auto"
    """`auto`, `uint16` or `int32`."""
    execution: ExecutorOptions | None = None
    """Where to run; None for `workers` processes here."""
    work_dir: Path | None = None
    """Folder for unfinished work; None for `OUTPUT.work`."""
    keep_work: bool = False
    force: bool = False
    """Throw away unfinished work of another command."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers} is too small; at least 1")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"--seed {self.seed} is not within 0 and 2^64 - 1")
        if self.on_bad_document not in ("stop", "skip"):
            raise ConfigError(f"--on-bad-document {self.on_bad_document}: choose stop or skip")
        if self.token_dtype not in ("auto", "uint16", "int32"):
            raise ConfigError(f"--token-dtype {self.token_dtype}: choose auto, uint16 or int32")

    @property
    def executor(self) -> ExecutorOptions:
        """Where to run."""
        return self.execution or ExecutorOptions(workers=self.workers)

    def command(self) -> dict[str, Any]:
        """Give what decides which bytes come out, for the work folder to compare."""
        return {
            "version": WORK_VERSION,
            "tokenizer": hash_tokenizer(self.tokenizer),
            "mixture": dataclasses.asdict(self.mixture),
            "seed": self.seed,
            "keys": dataclasses.asdict(self.keys),
            "on_bad_document": self.on_bad_document,
            "token_dtype": self.token_dtype,
        }


def plan_dataset(
    config: PreprocessConfig, text_bytes: int = DRY_RUN_TEXT_BYTES
) -> tuple[dict[str, SourceInfo], float]:
    """Tell what `preprocess` would make of each source, from a sample, writing nothing to keep.

    Returns: The sources, counts scaled to the whole corpus; and the share of the corpus that was read.
    """
    files, tokenizer = find_inputs(config.inputs), load_tokenizer(config.tokenizer, config.engine)
    options = _options(config, tokenizer, everything(config.mixture))
    with tempfile.TemporaryDirectory() as scratch, _full_disk(Path(scratch)):
        survey = survey_corpus(files, tokenizer, options, Path(scratch) / "tokens", text_bytes)
        tokens = max(round(config.mixture.train_tokens * survey.fraction), 1)
        valid = round(config.mixture.valid_tokens_per_source * survey.fraction)
        mixture = dataclasses.replace(
            config.mixture, train_tokens=tokens, valid_tokens_per_source=valid
        )
        (Path(scratch) / "plan").mkdir()
        try:
            plan = make_plan(
                survey.folders, mixture, Admission(), _overhead(tokenizer), Path(scratch) / "plan"
            )
        except DataError as error:
            if survey.fraction == 1:
                raise
            raise DataError(
                f"in a sample of {survey.fraction:.2%} of the corpus, all numbers scaled to it: {error}"
            ) from None
        sources = plan.sources
        if survey.fraction < 1:
            sources = {name: scale_source(info, survey.fraction) for name, info in sources.items()}
    return sources, survey.fraction


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
    work = _work_folder(config, output)
    with _full_disk(work), only_run(work):
        open_work(work, config.command(), files, force=config.force)
        with Monitor(work, files, on_progress) as monitor:
            plan, stage = _tokenize_and_plan(config, files, tokenizer, work, monitor)
            monitor.set_stage("write")
            folder = _write(config, files, tokenizer, work, plan, stage)
            check_unchanged(work / stage.name, files, find_inputs(config.inputs))
        manifest = folder.manifest
        _publish(folder.path, output)
        if not config.keep_work:
            shutil.rmtree(work)
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
        options = _options(config, tokenizer, admission)
        write_pickle(stage.job_path, _tokenize_job(config, files, tokenizer, options))
        if (work / EXPECTED_FILE).exists():
            monitor.expected = orjson.loads((work / EXPECTED_FILE).read_bytes())
        monitor.set_stage(stage.name)
        run_stage(stage, len(files), config.executor)
        monitor.set_stage("plan")
        scratch = work / "plan"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        folders = [stage.folder(index) for index in range(len(files))]
        try:
            overhead = _overhead(tokenizer)
            return make_plan(folders, config.mixture, admission, overhead, scratch), stage
        except UserError:
            # The same command would end here again: nothing to go on with.
            if not config.keep_work:
                shutil.rmtree(work)
            raise
        except TooTight as tight:
            number += 1
            write_json(work / f"admission.{number}", admission.widened(tight.wider).to_json())
            shutil.rmtree(work / stage.name)


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
        options = dataclasses.replace(_options(config, tokenizer, admission), skip_bad=True)
        survey = survey_corpus(files, tokenizer, options, folder)
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
        _dtype(config, tokenizer),
        tokenizer.bos_id,
        tokenizer.eod_id,
    )
    write_pickle(writing.job_path, job)
    run_stage(writing, len(job.parts), config.executor)
    folder = work / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    valid = write_valid(folder, job, plan.valid)
    train = write_train(folder, writing, job, plan.order)
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
        inputs=[_input_info(info) for info in infos],
        order=OrderInfo(**dataclasses.asdict(plan.evenness)),
        documents_empty=plan.stats.documents_empty,
        documents_bad=plan.stats.documents_bad,
        bad_documents=plan.stats.bad,
        warnings=plan.warnings,
        made_by=_made_by(tokenizer),
    )
    write_manifest(folder, manifest)
    write_report(folder / REPORT_FOLDER, manifest)
    return _Made(folder, manifest)


def _made_by(tokenizer: Tokenizer) -> dict[str, str]:
    made_by = {"engine": tokenizer.engine_name, "engine_version": tokenizer.engine_version}
    notes = {"engine_notes": "; ".join(tokenizer.engine_notes)} if tokenizer.engine_notes else {}
    return made_by | notes


def _input_info(info: dict[str, Any]) -> InputInfo:
    documents = sum(row[3] for row in info["strata"])
    return InputInfo(
        info["name"], info["size_bytes"], documents, info["xxh3_128"], info["documents_bad"]
    )


def _publish(folder: Path, output: Path | str) -> None:
    """Put the finished dataset in its place; at a URL the manifest comes last."""
    if not is_url(output):
        try:
            move_into_place(folder, Path(output))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with atomic_path(Path(output), directory=True) as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)
        return
    system, target = file_system(str(output))
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    for name in sorted(names, key=lambda name: name == "manifest.json"):
        system.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
        system.put_file(str(folder / name), f"{target}/{name}")


def _options(
    config: PreprocessConfig, tokenizer: Tokenizer, admission: Admission
) -> TokenizeOptions:
    return TokenizeOptions(
        seed=config.seed,
        keys=config.keys,
        long_threshold_tokens=config.mixture.long_threshold_tokens,
        admission=admission,
        dtype=_dtype(config, tokenizer),
        extra_tokens=extra_tokens_bound(config.tokenizer),
        skip_bad=config.on_bad_document == "skip",
        sources_allowed=named_sources(config.mixture),
    )


def _dtype(config: PreprocessConfig, tokenizer: Tokenizer) -> np.dtype:
    needed = token_dtype(tokenizer.vocab_size)
    if config.token_dtype == "auto":
        return needed
    asked = np.dtype(config.token_dtype).newbyteorder("<")
    if asked.itemsize < needed.itemsize:
        raise ConfigError(
            f"--token-dtype {config.token_dtype} is too small for a vocabulary of "
            f"{tokenizer.vocab_size:,} ids (Megatron uses it below 65,500); use int32 or auto"
        )
    return np.dtype("<i4") if asked.itemsize == 4 else np.dtype("<u2")


def _overhead(tokenizer: Tokenizer) -> int:
    return 1 + (tokenizer.bos_id is not None)


def _work_folder(config: PreprocessConfig, output: Path | str) -> Path:
    if config.work_dir is not None:
        return config.work_dir.absolute()
    if is_url(output):
        raise ConfigError(
            f"--output {output} is a URL: give --work-dir, a folder for the unfinished dataset (on a "
            "cluster, one that all nodes share)"
        )
    path = Path(output).absolute()
    return path.with_name(path.name + WORK_SUFFIX)


@contextmanager
def _full_disk(work: Path) -> Iterator[None]:
    """Turn failures of the file system into errors of the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{error.filename or work}: no space left ({error.strerror}); make room and give the same "
                "command again, which goes on where it was"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ConfigError(
                f"--output: {error.filename or work} cannot be written ({error.strerror}); give a folder "
                "that can"
            ) from None
        raise
