"""Jobs over the GPUs of a machine: several at a time, each with a log, done ones skipped."""

import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

NUM_LOG_LINES = 30


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command."""

    name: str
    command: tuple[str, ...]
    all_gpus: bool = False
    """Whether it takes every GPU; otherwise one."""
    may_stop_early: bool = False
    """Whether status 0 may leave work for the next call; `finished` then says."""
    finished: Path | None = None
    """File that says that the job has nothing left to do."""
    finished_text: str = ""
    """What that file must hold."""

    def is_finished(self) -> bool:
        """Whether the job has reached its end, as far as it can be seen."""
        if self.finished is None:
            return True
        return self.finished.is_file() and self.finished.read_text().strip() == self.finished_text


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What jobs run on."""

    gpus: int
    """0: the host."""
    jobs_per_gpu: int
    deadline: float | None
    """Time (of `time.monotonic`) at which everything is stopped."""

    @property
    def slots(self) -> list[str]:
        """Values of CUDA_VISIBLE_DEVICES, one for each job at a time."""
        if not self.gpus:
            return [""] * self.jobs_per_gpu
        # GPU by GPU, so that the first jobs spread.
        return [str(gpu) for _ in range(self.jobs_per_gpu) for gpu in range(self.gpus)]

    def seconds_left(self) -> float | None:
        """Seconds until the deadline."""
        return None if self.deadline is None else max(1.0, self.deadline - time.monotonic())


def run_jobs(jobs: Sequence[Job], machine: Machine, folder: Path) -> bool:
    """Run the jobs that are not done, as many at a time as there are slots.

    Args:
        folder: Work folder: `done/` and `logs/` are in it.
    Returns: Whether all are done.
    """
    left = [job for job in jobs if not _marker(folder, job).is_file()]
    alone = [job for job in left if job.all_gpus]
    shared = [job for job in left if not job.all_gpus]
    ended = [_run(job, None, machine, folder) for job in alone]
    slots: queue.SimpleQueue[str] = queue.SimpleQueue()
    for slot in machine.slots:
        slots.put(slot)

    def run_one(job: Job) -> bool:
        slot = slots.get()
        try:
            return _run(job, slot, machine, folder)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(len(machine.slots)) as pool:
        return all([*ended, *pool.map(run_one, shared)])


def _marker(folder: Path, job: Job) -> Path:
    return folder / "done" / job.name


def _run(job: Job, slot: str | None, machine: Machine, folder: Path) -> bool:
    marker, log = _marker(folder, job), folder / "logs" / f"{job.name}.log"
    marker.parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if slot is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot
    started = time.monotonic()
    left = machine.seconds_left()
    if left is not None and left <= 1.0:
        _say(f"{job.name}: no time left; the same command resumes")
        return False
    _say(f"{job.name}: started")
    status = _execute(job, log, environment, left)
    seconds = time.monotonic() - started
    if status == 0 and job.is_finished():
        marker.touch()
        _say(f"{job.name}: done in {seconds:.0f} s")
        return True
    if status is None or (status == 0 and job.may_stop_early):
        _say(
            f"{job.name}: stopped after {seconds:.0f} s at the time limit; the same command resumes"
        )
        return False
    lines = log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
    tail = "\n".join(f"  | {line}" for line in lines)
    _say(
        f"{job.name}: failed with status {status} after {seconds:.0f} s\n$ {shlex.join(job.command)}\n"
        f"{tail}\nthe whole log: {log}"
    )
    return False


def _execute(job: Job, log: Path, environment: dict[str, str], seconds: float | None) -> int | None:
    """Run the command; None when its time was up."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(job.command)}\n")
        file.flush()
        with subprocess.Popen(
            job.command, env=environment, stdout=file, stderr=subprocess.STDOUT
        ) as process:
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                return None
            except BaseException:
                process.terminate()
                raise


_PRINTING = threading.Lock()


def _say(text: str) -> None:
    with _PRINTING:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
        sys.stdout.flush()
