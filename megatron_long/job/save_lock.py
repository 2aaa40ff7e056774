"""One job at a time on a `--save` folder: a lock that names its holder and does not outlive it.

The first process of a job holds `SAVE/.save_lock` in two ways, which cover different file systems:

- A kernel lock (`fcntl.lockf`), which is released when the process ends for any reason, and which forked
  helpers do not hold. Local disks support it, NFS (the server holds it), and Lustre mounted with `flock`.
- A heartbeat: the file names the holder, and the holder increments a counter in it every `BEAT_S`, for mounts
  without locks (Lustre `noflock`) or with locks local to one machine (Lustre `localflock`, NFS
  `local_lock`). A changing counter means that the holder is alive; clocks are never compared.

On one machine only the kernel lock decides. Another machine takes a folder when its holder has exited,
when the same job restarts (SLURM requeue, torchrun restart), or when the counter has not changed for
`SILENCE_S` and the lock is free. A failed node's lock on NFS expires with its lease, 90 s by default.
"""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_long.errors import ConfigError

LOCK_NAME = ".save_lock"
BEAT_S, SILENCE_S = 10.0, 60.0
GRACE_S = 5.0
"""How long a process of this machine may take to end."""
LEASE_S = 150.0
"""How long to wait for a lock without a heartbeat."""
POLL_S = 0.25
_SIZE = 1024
"""Bytes of the file: written in place, so that a full disk does not stop the heartbeat."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)

Verdict = Literal["take", "refuse", "wait"]


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a folder."""

    host: str
    boot_id: str
    """Id of the running kernel: processes with the same one share its locks, also in containers."""
    pid: int
    started: float
    """Start of the process, seconds since 1970."""
    job: str = ""
    """SLURM's or torchrun's id of the job."""
    attempt: tuple[int, int] = (0, 0)
    """How many times SLURM and torchrun have restarted that job."""
    beat: int = 0
    ended: bool = False

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}, started {began}{job}"

    def lives_here(self) -> bool:
        """Whether its process runs on this machine."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.Error:
            return False


def this_process() -> Holder:
    """This process as a holder."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    slurm, torchrun = (int(os.environ.get(name) or 0) for name in counts)
    return Holder(
        host=socket.gethostname(),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        job="" if job == "none" else job,
        attempt=(slurm, torchrun),
    )


def decide(
    me: Holder, *, is_locked: bool | None, first: Holder | None, now: Holder | None, waited_s: float
) -> Verdict:
    """Whether a folder can be taken.

    Args:
        is_locked: Whether the kernel gave this process the lock; None if there are no locks.
        first, now: The holder that the file named at first and names now; None where it names nobody.
        waited_s: Seconds since `first` was read.
    """
    is_here = now is not None and now.boot_id == me.boot_id
    if is_locked is False:
        patience_s = GRACE_S if now is None or is_here or now != first else LEASE_S
        return "refuse" if waited_s >= patience_s else "wait"
    if now is None or now.ended:
        return "take"
    if is_here:
        return "take" if is_locked or not now.lives_here() else "refuse"
    if now.job and now.job == me.job and now.attempt < me.attempt:
        return "take"
    if now != first:
        return "refuse"
    return "take" if waited_s >= SILENCE_S else "wait"


class SaveLock:
    """Holds a folder from `take` to `release`, or to the end of the process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self.me = this_process()
        self._descriptor = -1
        self._left = threading.Event()
        self._writing = threading.Lock()

    def take(self) -> None:
        """Take the folder; waits if the holder may have been killed.

        Raises: ConfigError: another job uses it. OSError: the folder cannot be written to.
        """
        began, first = time.monotonic(), None
        while True:
            # Each look reopens the file: NFS then asks the server. Closing it releases the lock.
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            is_locked, now = _try_lock(descriptor), _read(descriptor)
            if first is None and now is not None:
                first = now
                self._tell(now, is_locked)
            waited_s = time.monotonic() - began
            verdict = decide(self.me, is_locked=is_locked, first=first, now=now, waited_s=waited_s)
            if verdict == "take":
                break
            os.close(descriptor)
            if verdict == "refuse":
                raise self._refusal(now)
            time.sleep(POLL_S)
        self._descriptor = descriptor
        self._write()
        atexit.register(self.release)
        threading.Thread(target=self._beat, name="save lock", daemon=True).start()
        if not is_locked:
            self._confirm()

    def release(self) -> None:
        """Record that the job has ended, and release the lock."""
        if self._left.is_set():
            return
        with contextlib.suppress(OSError):
            self._write(ended=True)
        self._let_go()

    def _let_go(self) -> None:
        with self._writing:  # its number may soon be that of another file
            self._left.set()
            os.close(self._descriptor)

    def _tell(self, holder: Holder, is_locked: bool | None) -> None:
        verdict = decide(self.me, is_locked=is_locked, first=holder, now=holder, waited_s=0)
        if verdict == "wait":
            print(
                f"note: {self.path.parent} was last held by {holder}, which did not record its end: "
                f"waiting for its heartbeat, {SILENCE_S:.0f} s or more",
                file=sys.stderr,
            )

    def _refusal(self, holder: Holder | None) -> ConfigError:
        return ConfigError(
            f"--save {self.path.parent} is in use by another job ({holder or 'it has just started'}); two "
            "jobs in one folder would overwrite each other's checkpoints. Wait for that job, end it, or give "
            "another --save"
        )

    def _confirm(self) -> None:
        """Without locks two jobs may take the folder at the same time: the file names the one that has it."""
        time.sleep(2)
        with open(self.path, "rb") as file:
            holder = _read(file.fileno())
        if holder is not None and (holder.boot_id, holder.pid) != (self.me.boot_id, self.me.pid):
            self._let_go()
            raise self._refusal(holder)

    def _beat(self) -> None:
        while not self._left.wait(BEAT_S):
            with contextlib.suppress(OSError):
                self._write(beat=self.me.beat + 1)

    def _write(self, **changes: Any) -> None:
        with self._writing:
            if self._left.is_set():
                return
            self.me = replace(self.me, **changes)
            os.pwrite(self._descriptor, json.dumps(asdict(self.me)).encode().ljust(_SIZE), 0)
            os.fsync(self._descriptor)  # NFS would cache it for a while


def _try_lock(descriptor: int) -> bool | None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _read(descriptor: int) -> Holder | None:
    try:
        content = json.loads(os.pread(descriptor, _SIZE, 0))
        return Holder(**content | {"attempt": tuple(content["attempt"])})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


_held: dict[Path, SaveLock] = {}


def hold(folder: Path) -> None:
    """Hold a folder until this process ends; does nothing if it holds it already.

    Raises: ConfigError: another job uses it. OSError: the folder cannot be written to.
    """
    path = folder.resolve()
    if path not in _held:
        lock = SaveLock(folder)
        lock.take()
        _held[path] = lock
