"""Where a run starts: its checkpoint, and the checks before it may write next to it.

Guarantees and their tests: docs/reliability.md.
"""

import json
import os
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_long.checkpoint.choosing import (
    METADATA_NAME,
    RELEASE,
    Choice,
    choose_checkpoint,
    find_remains,
    has_checkpoint,
    newest_iteration,
    no_metadata,
    remove_leftovers,
    saved_iterations,
    set_aside,
)
from megatron_long.checkpoint.hashes import write_sidecar_hashes
from megatron_long.checkpoint.opening import split_checkpoint
from megatron_long.checkpoint.run_identity import (
    check_content,
    check_same_data,
    check_same_optimizer,
    describe_data,
    file_times,
)
from megatron_long.checkpoint.saving import read_facts
from megatron_long.checkpoint.sidecars import TRACKER_NAME
from megatron_long.dataset.manifest import Manifest, read_manifest
from megatron_long.errors import ConfigError, DataError
from megatron_long.files import atomic_path
from megatron_long.flags.arguments import LongContextArguments
from megatron_long.job import rendezvous
from megatron_long.job.save_lock import hold
from megatron_long.job.start_log import StartLog, describe_start, start_log_path
from megatron_long.training.next_stage import check_next_stage

MAX_SOCKET_PATH_BYTES = 107
"""Of Linux: `sun_path` of unix(7), without its final zero."""


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    choice: Choice | None
    """The checkpoint to load; None for random weights."""
    resumes: bool
    """Whether it resumes at the checkpoint's step, with its optimizer and its position in the data."""
    data: dict[str, Any]
    """See `describe_data`."""
    dataset_files: dict[str, list[int]] | None
    """See `file_times`."""
    guard_state: dict[str, Any]
    weights: str | None = None
    """Key prefix of the weights to use; None if optimizer state is loaded with them."""
    stages: tuple[dict[str, Any], ...] = ()
    """Stages before this one, see `next_stage.check_next_stage`."""
    begins_stage: bool = False
    """Whether it begins at step 0 with the optimizer of another run."""

    @property
    def iteration(self) -> int:
        """Completed steps."""
        return (self.choice.iteration or 0) if self.choice and self.resumes else 0


def find_start(arguments: LongContextArguments, args: Namespace) -> Start:
    """Choose and check the checkpoint that Megatron is to load, and compare its data with this run's.

    Every process of the job calls it: each reads a share of the files.

    Raises: DataError: no checkpoint is complete, or the dataset does not match its manifest.
        ConfigError: the run was trained on other data, or `--save` holds another run.
    """
    stage = arguments.next_stage_of
    choice = _choose(args, stage)
    own = choice is not None and args.load and choice.folder.parent == Path(args.load)
    resumes = bool(own and not args.finetune and choice and choice.iteration is not None)
    if args.save and not (resumes and _same_folder(args.load, args.save)):
        rendezvous.from_first(lambda: _refuse_used_save(args))
    begins_stage = bool(stage and choice and not own)
    facts = read_facts(choice.folder) if choice and (resumes or begins_stage) else {}
    folder = Path(arguments.dataset) if arguments.dataset else None
    manifest = read_manifest(folder) if folder else None
    data = describe_data(manifest, args)
    if choice and resumes and not arguments.allow_dataset_change:
        check_same_data(facts.get("data", {}), data, choice.folder)
    times = None
    stages = list(facts.get("stages", ()))
    if stage and choice and begins_stage:
        before, facts = facts, {}
        stages.append(_check_next_stage(stage, choice, before, data, args))
    if folder and manifest:
        _check_content(folder, manifest, facts.get("dataset_files"))
        times = file_times(folder, manifest)
    alone = choice is not None and not begins_stage and (not resumes or args.no_load_optim)
    weights = find_weights_to_start_from(choice.folder) if choice and alone else None
    guard = facts.get("guard", {})
    return Start(choice, resumes, data, times, guard, weights, tuple(stages), begins_stage)


def check_save_again(start: Start, args: Namespace) -> None:
    """Refuse a folder that another job created and saved to between `find_start` and `hold_save`.

    Every process of the job calls it, once the folder is held: one that was missing before could not be.

    Raises: ConfigError: it holds checkpoints that this start did not find.
    """
    if not (start.resumes and _same_folder(args.load, args.save)):
        rendezvous.from_first(lambda: _refuse_used_save(args))


def _refuse_used_save(args: Namespace) -> list[str]:
    """Refuse to write among another run's checkpoints, which would be mixed or overwritten."""
    saved = saved_iterations(Path(args.save))
    if not saved:
        return []
    start = "this start does not resume it"
    if args.finetune:
        start = "--finetune starts another run at step 0"
    elif args.load:
        start = f"this run starts from --load {args.load}"
    raise ConfigError(
        f"--save {args.save} holds checkpoints of a run up to step {saved[0]}, and {start}, which would "
        f"write among them; to resume that run give --load {args.save} without --finetune, for another one "
        "a new --save"
    )


def _same_folder(one: str | None, other: str) -> bool:
    return one is not None and Path(one).resolve() == Path(other).resolve()


def check_temporary_folder() -> None:
    """Refuse a TMPDIR whose path is too long for the sockets of a save.

    Raises: ConfigError: its path is too long for Linux's 107 bytes of a socket's path.
    """
    folder = tempfile.gettempdir()
    longest = MAX_SOCKET_PATH_BYTES - len("/pymp-12345678/listener-12345678")
    if (length := len(os.fsencode(folder))) > longest:
        raise ConfigError(
            f"TMPDIR {folder} has {length} bytes, and at most {longest} leave room for the sockets that "
            "Python's multiprocessing opens there at each save; set TMPDIR to a shorter path"
        )


def hold_save(save: str | None) -> None:
    """Keep other jobs from writing to `--save`; a missing folder cannot be locked.

    Every process of the job calls it.

    Raises: ConfigError: another job uses it, or no process could save (`check_temporary_folder`).
    """
    if save:
        check_temporary_folder()

    def claim() -> list[str]:
        if save and Path(save).is_dir():
            try:
                hold(Path(save))
            except OSError as error:
                print(f"warning: --save {save} could not be locked ({error})", file=sys.stderr)
        return []

    rendezvous.from_first(claim)


def _check_next_stage(stage: str, *args: Any) -> dict[str, Any]:
    (found,) = rendezvous.from_first(lambda: [json.dumps(check_next_stage(stage, *args))])
    return json.loads(found)


def _choose(args: Namespace, stage: str | None) -> Choice | None:
    if rendezvous.share()[0] == 0 and args.save:
        remove_leftovers(Path(args.save))
    (folder,) = rendezvous.from_first(lambda: [_start_folder(args)])
    if not folder:
        return None
    step = args.ckpt_step
    if stage and not has_checkpoint(args.load):
        if step:
            raise ConfigError(
                f"--ckpt-step {step} chooses among the checkpoints of --load, which holds none; give "
                f"--next-stage-of {folder}/iter_{step:07d}"
            )
        step = split_checkpoint(Path(stage))[1]
    choice = choose_checkpoint(
        Path(folder),
        step,
        share=rendezvous.share(),
        agree=rendezvous.agree,
        from_first=rendezvous.from_first,
    )
    if rendezvous.share()[0] == 0:
        for report in choice.reports:
            print(f"warning: {report}", file=sys.stderr)
        if choice.reports:
            print(f"warning: {choice.folder} is used; all its files were checked", file=sys.stderr)
        if not choice.checked:
            print(
                f"note: {choice.folder} has no hashes.json, so it was not checked", file=sys.stderr
            )
        if choice.reports and args.save and choice.folder.parent == Path(args.save):
            _put_in_order(Path(args.save), choice)
    return choice


def _start_folder(args: Namespace) -> str:
    """Where the run starts from, and notes on skipped checkpoints; "" for random weights."""
    if has_checkpoint(args.load):
        return args.load
    for path in find_remains(Path(args.load)) if args.load else ():
        print(f"note: {no_metadata(path)}; it is skipped", file=sys.stderr)
    return args.pretrained_checkpoint or ""


def _put_in_order(folder: Path, choice: Choice) -> None:
    """Make the chosen checkpoint the newest in the folder of this run."""
    set_aside(folder, choice)
    with atomic_path(folder / TRACKER_NAME) as temporary:
        temporary.write_text(str(choice.iteration or RELEASE), encoding="utf-8")


def find_weights_to_start_from(folder: Path) -> str | None:
    """Which weights a start without optimizer state uses; None for formats of other programs."""
    from megatron_long.checkpoint.megatron_folder import holds_rounded_weights, main_prefix
    from megatron_long.checkpoint.torch_dist import read_common_state

    def look() -> list[str]:
        try:
            state = read_common_state(folder)
        except DataError:
            return ["", "unknown"]  # of another program, or damaged: loading it will show
        rounded = holds_rounded_weights(state)
        prefix = main_prefix(folder) if rounded else ""
        if prefix is None:
            print(
                f"warning: {folder} holds weights that FP8 rounded, and not the optimizer's main copy of "
                "them (--no-save-optim): training starts from the rounded ones",
                file=sys.stderr,
            )
        return [prefix or "", ""]

    prefix, unknown = rendezvous.from_first(look)
    return None if unknown else prefix


def check_optimizer(start: Start, args: Namespace) -> None:
    """Refuse a checkpoint whose optimizer state Megatron could not load; each process of the job calls it.

    Args:
        args: Flags after Megatron's validation.
    Raises: ConfigError, DataError: see `check_same_optimizer`.
    """

    def check() -> list[str]:
        folder = start.choice.folder if start.choice else Path()
        loads = start.begins_stage or (start.resumes and not args.no_load_optim)
        if loads and (folder / METADATA_NAME).is_file():
            check_same_optimizer(folder, args)
        return []

    rendezvous.from_first(check)


def _check_content(folder: Path, manifest: Manifest, times_before: Any) -> None:
    findings: list[str] = []
    if rendezvous.share()[0] == 0:
        try:
            check_content(folder, manifest, times_before)
        except DataError as error:
            findings = [str(error)]
    findings = rendezvous.agree(findings)
    if findings:
        raise DataError(f"{findings[0]}; copy or make the dataset again")


def record_sidecars(folder: Path, start: Start) -> None:
    """Hash the files next to the checkpoints, once they are written for this run."""
    latest: int | str | None = None
    if start.choice is not None and start.choice.folder.parent == folder:
        latest = start.choice.iteration or RELEASE
    elif has_checkpoint(folder):
        latest = newest_iteration(folder)[0] or RELEASE
    write_sidecar_hashes(folder, latest)


def check_writable(save: Path) -> None:
    """Check early; existing files stay unchanged until Megatron has loaded and accepted everything.

    Raises: ConfigError: the folder is not writable.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save):
            pass
    except OSError as error:
        raise unwritable(save, str(error)) from error


def check_loss_log(path: str | None, writes: bool) -> None:
    """Find out early that `--loss-log` takes no lines; each process of the job calls it.

    Args:
        writes: Whether this process is the one that will write it.
    Raises: ConfigError: on every process; it is a folder or a pipe, or nothing can be written there.
    """
    findings: list[str] = []
    if path and writes:
        try:
            _try_to_append(Path(path))
        except OSError as error:
            findings = [f"--loss-log {path} cannot be written to ({error}); give another file"]
    findings = rendezvous.agree(findings)
    if findings:
        raise ConfigError(findings[0])


def _try_to_append(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.TemporaryFile(dir=path.parent):
            return
    file = os.open(
        path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK
    )  # a pipe would wait for its reader
    try:
        os.lseek(file, 0, os.SEEK_END)
    finally:
        os.close(file)


def unwritable(save: Path, reason: str) -> ConfigError:
    """The error of a `--save` that is not writable."""
    return ConfigError(f"--save {save} cannot be written to ({reason}); nothing has been trained")


def tell_start(args: Namespace, start: Start, start_log: StartLog) -> None:
    """Print what is about to be trained, and where Megatron's other output is; for one rank."""
    path = start_log_path(args.save, args.loss_log)
    if path is not None:
        start_log.write_to(path)
    checkpoint = start.choice.folder if start.choice else None
    how = "resumed" if start.resumes else "weights alone, from step 0"
    if start.begins_stage:
        how = f"weights and optimizer, from step 0 of stage {len(start.stages) + 1}"
    if start.weights:
        how += "; they are its optimizer's float32 main copy"
    for line in describe_start(args, checkpoint, how):
        start_log.say(line)
    if not start_log.verbose:
        where = f"is in {path}" if path else "is omitted"
        start_log.say(f"Megatron's output before the first step {where}; --verbose prints it")
