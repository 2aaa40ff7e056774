"""Run the items of a stage: here in processes, or on a cluster through datatrove's executors.

Each item knows whether it is done (its output is in place), so every executor runs the same code, an
interrupted stage continues with what is left, and neither the number of workers nor their order matters.
"""

import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import orjson
import xxhash

from megatron_long.errors import ConfigError, DataError, UserError
from megatron_long.files import atomic_path
from megatron_long.job.signals import end_with_parent
from megatron_long.preprocess.publish import disk_errors

logger = logging.getLogger(__name__)

EXECUTORS = ("local", "slurm", "ray")
POLL_SECONDS = 2.0
RAY_RETRIES = 3
"""Times that Ray starts a task again whose worker or node died."""
JOB_GONE_POLLS = 5
"""A SLURM job that is not in the queue for so many looks has ended."""


class Stage(Protocol):
    """Items that can be run in any order, anywhere."""

    @property
    def name(self) -> str:
        """Its name in the work folder."""

    @property
    def work(self) -> Path:
        """The work folder."""

    def run(self, index: int) -> None:
        """Run one item; its output appears whole or not at all."""

    def is_done(self, index: int) -> bool:
        """Tell whether the output of an item is in place."""


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """Where and how wide to run."""

    executor: str = "local"
    workers: int = 1
    """Processes at a time."""
    tasks: int = 1000
    """Tasks that a stage is divided into on a cluster."""
    slurm_partition: str | None = None
    slurm_time: str = "24:00:00"
    memory_gb: int = 4
    """Memory of a task, GiB."""
    slurm_args: dict[str, str] = field(default_factory=dict)
    """More flags of sbatch, without dashes."""

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ConfigError(f"--executor {self.executor}: choose one of {', '.join(EXECUTORS)}")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers} is too small; at least 1")
        if self.tasks < 1:
            raise ConfigError(f"--tasks {self.tasks} is too small; at least 1")
        if self.executor == "slurm" and self.slurm_partition is None:
            raise ConfigError(
                "--executor slurm needs --slurm-partition, a partition of your cluster"
            )


def run_stage(stage: Stage, count: int, options: ExecutorOptions) -> None:
    """Run the items 0 to count - 1 that are not done.

    Raises: UserError: what an item raised. ConfigError: a worker died, or the cluster ended a task.
    """
    pending = [index for index in range(count) if not stage.is_done(index)]
    if not pending:
        return
    if options.executor != "local":
        _run_on_cluster(stage, pending, options)
    elif runs_here(options, len(pending)):
        for index in pending:
            stage.run(index)
    else:
        _run_in_processes(stage, pending, min(options.workers, len(pending)))


def runs_here(options: ExecutorOptions, count: int) -> bool:
    """Return whether this process itself runs that many items."""
    return options.executor == "local" and (options.workers == 1 or count <= 1)


def _run_in_processes(stage: Stage, pending: Sequence[int], workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    # Ctrl-C is for this process: workers inherit the mask, and are ended below.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Without its run a worker would wait for work for ever.
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    try:
        futures = [pool.submit(stage.run, index) for index in pending]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool:
        raise ConfigError(
            f"a worker of --workers {workers} died, most likely killed for want of memory; use fewer "
            "workers: the same command resumes where it was"
        ) from None
    except KeyboardInterrupt:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # each would finish its file first, which may take hours
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class ClusterStep:
    """One step of a datatrove pipeline: task `rank` runs every `world_size`-th item that is pending."""

    stage: Stage
    pending: list[int]
    errors: Path

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        for index in self.pending[rank::world_size]:
            try:
                if not self.stage.is_done(index):
                    with disk_errors(self.stage.work):
                        self.stage.run(index)
            except Exception as error:
                # The log of a task is far away; this is what the waiting run shows.
                with atomic_path(self.errors / f"{index:06d}.json") as path:
                    kind = "user" if isinstance(error, UserError) else type(error).__name__
                    path.write_bytes(orjson.dumps({"kind": kind, "message": str(error)}))
                raise


def _run_on_cluster(stage: Stage, pending: list[int], options: ExecutorOptions) -> None:
    package = "datatrove" if options.executor == "slurm" else "ray"
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"--executor {options.executor} needs `pip install {package}`") from None
    # A folder for each attempt: datatrove marks tasks by number, and the items of a number change.
    logs = _private_folder(stage.work / "logs") / f"{stage.name}.{time.time_ns()}"
    errors = logs / "errors"
    errors.mkdir(parents=True)
    step = ClusterStep(stage, pending, errors)
    tasks = min(options.tasks, len(pending))
    if options.executor == "slurm":
        _run_slurm(step, logs, tasks, options)
    else:
        _run_ray(step, tasks, options)
    _raise_errors(errors)
    missing = [index for index in pending if not stage.is_done(index)]
    if missing:
        raise ConfigError(
            f"--executor {options.executor}: {len(missing)} of {len(pending)} items of stage {stage.name} "
            f"were not done; look into {logs}, and give the same command again to resume"
        )


def _private_folder(folder: Path) -> Path:
    """Give a folder where nobody else can write: datatrove's tasks unpickle the job file that lies there.

    Raises: ConfigError: it belongs to somebody else.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    except PermissionError as error:
        raise ConfigError(
            f"{folder} cannot be closed to other users ({error.strerror}), who could run programs through "
            "the job file in it; remove it, or give an --output whose folder is yours alone"
        ) from error
    return folder


def _run_slurm(step: ClusterStep, logs: Path, tasks: int, options: ExecutorOptions) -> None:
    from datatrove.executor import SlurmPipelineExecutor

    launcher = Path(sys.executable).parent / "launch_pickled_pipeline"
    if not launcher.exists():
        raise ConfigError(f"--executor slurm: {launcher} is missing; `pip install datatrove`")
    executor = SlurmPipelineExecutor(
        pipeline=[step],
        tasks=tasks,
        workers=options.workers,
        time=options.slurm_time,
        partition=options.slurm_partition,
        mem_per_cpu_gb=options.memory_gb,
        job_name=_job_name(step.stage.work),
        logging_dir=str(logs),
        # The tasks find the launcher and the package as this process does.
        env_command=f'export PATH="{launcher.parent}:$PATH" PYTHONPATH="{_package_paths()}"',
        sbatch_args=options.slurm_args,
        randomize_start_duration=0,
        qos="",
    )
    try:
        # Without the job that merges datatrove's own statistics, which are not used.
        executor.launch_merge_stats = lambda: None
        with _outside_of_a_job():
            executor.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"--executor slurm: sbatch failed ({error})") from None
    absent = 0
    try:
        while any(not step.stage.is_done(i) for i in step.pending) and absent < JOB_GONE_POLLS:
            _raise_errors(step.errors)
            # None: the controller does not answer, and is asked again.
            absent = absent + 1 if _is_queued(step.stage.work) is False else 0
            time.sleep(POLL_SECONDS)
    except BaseException:
        _cancel(step.stage.work)
        raise


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hide what SLURM tells the job that this process may be part of.

    sbatch hands it on, and srun refuses a task with, for example, two limits of memory.
    """
    names = [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def end_earlier_tasks(work: Path) -> None:
    """Cancel the tasks of an earlier start that was killed, and wait for their end.

    They would go on in the queue, and put what they make of their plan among what this start makes.

    Raises: ConfigError: there was such a start, and SLURM cannot be asked.
    """
    if not any(work.glob("logs/*/executor.pik")):
        return
    queued = _is_queued(work)
    if queued is None:
        raise ConfigError(
            f"{work} was used by --executor slurm, and squeue does not answer here: its tasks may still run; "
            f"end them where SLURM is (scancel --name={_job_name(work)}), then remove {work / 'logs'}"
        )
    if not queued:
        return
    logger.warning("SLURM still has tasks of an earlier start (%s): ending them", _job_name(work))
    _cancel(work)
    while _is_queued(work) is not False:
        time.sleep(POLL_SECONDS)


def _job_name(work: Path) -> str:
    """Return the name of all jobs of a work folder, by which they are found again."""
    return f"preprocess-{xxhash.xxh3_64_hexdigest(os.fsencode(work))}"


def _cancel(work: Path) -> None:
    command = ["scancel", f"--user={os.getuid()}", f"--name={_job_name(work)}"]
    subprocess.run(command, capture_output=True, check=False)


def _package_paths() -> str:
    """Give the paths of imports that a bare interpreter of this environment lacks."""
    prefixes = (sys.prefix, sys.base_prefix)
    return os.pathsep.join(path for path in sys.path if path and not path.startswith(prefixes))


def _is_queued(work: Path) -> bool | None:
    """Return whether SLURM has tasks of a work folder; None if it cannot be asked."""
    command = ["squeue", f"--user={os.getuid()}", "--noheader", f"--name={_job_name(work)}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return bool(found.stdout.strip()) if found.returncode == 0 else None


def _run_ray(step: ClusterStep, tasks: int, options: ExecutorOptions) -> None:
    """Run the tasks as Ray's own, which it starts again when a worker or a node dies.

    Not datatrove's executor: it forks each task from an actor, and waits for ever when the fork is killed.
    """
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    import ray

    started = not ray.is_initialized()
    if started:
        paths = {"env_vars": {"PYTHONPATH": _package_paths()}}
        ray.init(log_to_driver=False, runtime_env=paths)
    running: list[Any] = []
    try:
        _warn_if_none_fits(ray.nodes(), options.memory_gb)
        task = ray.remote(num_cpus=1, memory=options.memory_gb << 30, max_retries=RAY_RETRIES)(
            _run_task
        )
        shared = ray.put(step)
        for rank in range(tasks):
            running.append(task.remote(shared, rank, tasks))
            while len(running) >= (options.workers if rank < tasks - 1 else 1):
                done, running = ray.wait(running)
                ray.get(done)
    except ray.exceptions.RayError as error:
        _raise_errors(step.errors)
        raise ConfigError(
            f"--executor ray: {error}; look into the logs of Ray, and give the same command again to resume"
        ) from error
    finally:
        for one in running:
            ray.cancel(one, force=True)
        if started:
            ray.shutdown()


def _run_task(step: ClusterStep, rank: int, tasks: int) -> None:
    step(None, rank, tasks)


def _warn_if_none_fits(nodes: list[dict[str, Any]], memory_gb: int) -> None:
    sizes = [node["Resources"].get("memory", 0) / 2**30 for node in nodes if node["Alive"]]
    if memory_gb > max(sizes, default=0):
        logger.warning(
            "--task-memory-gb %d: no node of the Ray cluster has as much (the largest: %.1f), so the tasks "
            "wait until one joins; give less",
            memory_gb,
            max(sizes, default=0),
        )


def _raise_errors(errors: Path) -> None:
    for path in sorted(errors.glob("*.json")):
        content = orjson.loads(path.read_bytes())
        if content["kind"] == "user":
            raise DataError(content["message"])
        raise ConfigError(
            f"a task failed ({content['kind']}: {content['message']}); look into {errors.parent}"
        )
